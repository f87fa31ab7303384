"""Run by `test_native_forms.py` in ComfyUI's folder and interpreter: prints what it saw there, as JSON.

The forms of the native policy: dropout, a LoRA to start from, conditionings of the graph, and the MODEL that comes out,
on the small random networks of `comfy_native_models.py`.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_native_case import Case, randomise, worst  # first: it finds ComfyUI
from comfy_native_models import SIDE

# isort: split
import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_patcher
import comfy.ops
import comfy.sd1_clip
import comfy_lora
import folder_paths
import torch
from bright import register
from comfy_lora import difference
from comfy_native_node import WIDGETS, execute, native_node, same, sessions, step
from comfy_networks import CPU
from safetensors.torch import save_file
from torch import Tensor

import nodes as core
from dgpo_core.common.prompts import Prompt
from dgpo_core.policy import Cond, load_policy
from dgpo_core.settings.config import RolloutConfig

values = importlib.import_module("pack.common.values")
Given = list[list[Any]]


# --- texts -----------------------------------------------------------------------------------------------------------


class Reading:
    """ComfyUI's own tokenizer and a small CLIP of its own class, with random weights."""

    layer_idx = None

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
        more = {"hidden_act": "quick_gelu", "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
        self.tokenizer = comfy.sd1_clip.SD1Tokenizer()
        self.encoder = comfy.sd1_clip.SDClipModel(device="cpu", textmodel_json_config={**sizes, **more})
        for parameter in self.encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.patcher = comfy.model_patcher.ModelPatcher(self.encoder, CPU, CPU)

    def tokenize(self, text: str) -> Any:
        return self.tokenizer.tokenize_with_weights(text)

    def encode_from_tokens_scheduled(self, tokens: Any) -> Given:
        texts, pooled = self.encoder.encode_token_weights(tokens["l"])
        return [[texts, {"pooled_output": pooled}]]


@torch.inference_mode()
def weighted() -> dict[str, float]:
    """A text with a weight against CLIPTextEncode's, and how far it is from the text without."""
    clip = Reading()
    texts = importlib.import_module("pack.on_model.texts").by_clip(clip)
    ((ours, _),), ((plain, _),) = texts.encode("a (red:1.4) lamp"), texts.encode("a red lamp")
    (((theirs, _),),) = core.CLIPTextEncode().encode(clip, "a (red:1.4) lamp")
    return {"same": bool(torch.equal(ours, theirs)), "effect": difference(ours, plain)}


# --- dropout ---------------------------------------------------------------------------------------------------------


def dropout(case: Case) -> dict[str, float | bool]:
    """Gradients with dropout, with and without checkpointing, from the seeds of the rows."""
    found = []
    for checkpointing in (False, True):
        policy = case.policy(dropout=0.5)
        randomise(policy)
        if checkpointing:
            policy.enable_gradient_checkpointing()
        plain = case.gradients(policy)[0]
        for seed in (1, 1, 2):
            with policy.dropping([seed, 10 + seed, 20 + seed]):
                found.append(case.gradients(policy)[:2])
        off = bool(torch.equal(case.gradients(policy)[0], plain))
        if not checkpointing:
            texts, alone = beside_others(case, policy)
        policy.to("cpu")
    (y, grads), again, other, (y_checkpointed, grads_checkpointed), *_ = found
    return {
        "effect": difference(y, plain),
        "repeats": difference(again[0], y),
        "other_seed": difference(other[0], y),
        "checkpointed": difference(y_checkpointed, y),
        "gradient": worst(grads_checkpointed, grads),
        "off": off,
        "texts": difference(texts, alone),
    }


def beside_others(case: Case, policy: Any) -> tuple[Tensor, Tensor]:
    """Rows of two texts in one batch, and the same rows one at a time, each with its own seed."""
    x, t, _ = case.inputs()
    cond = Cond.cat(policy.encode(["red", "blue", "red"]))
    seeds, parts = (3, 4, 5), []
    with torch.no_grad():
        with policy.dropping(seeds):
            together = policy.predict(x, t, cond)
        for i, seed in enumerate(seeds):
            row = slice(i, i + 1)
            with policy.dropping([seed]):
                parts.append(policy.predict(x[row], t[row], cond.select(row)))
    return together, torch.cat(parts)


# --- start_from ------------------------------------------------------------------------------------------------------


def starting(case: Case, root: Path) -> dict[str, Any]:
    """What was saved is read back, also from a file of the diffusers policy for the same network; misfits are told."""
    policy = case.policy()
    randomise(policy)
    policy.save_lora(root / "loras" / f"{case.family}.safetensors")
    x, t, _ = case.inputs()
    found: dict[str, Any] = {}
    for name, rank in (("same", 4), ("larger", 6)):
        handle = execute(case, start_from=f"{case.family}.safetensors", rank=rank, alpha=12.0)
        again = sessions._load(handle.spec).policy
        with torch.no_grad():
            expected = policy.predict(x, t, policy.encode(["red"])[0].expand(3))
            for adapter in ("current", "old", "ema"):
                with again.using(adapter):
                    differs = difference(again.predict(x, t, again.encode(["red"])[0].expand(3)), expected)
                found[name] = max(differs, found.get(name, 0.0))
            with again.using(None):
                found["base"] = difference(again.predict(x, t, again.encode(["red"])[0].expand(3)), case.reference())
    small = execute(case, start_from=f"{case.family}.safetensors", rank=2)
    found["small"] = comfy_lora.error(lambda: sessions._load(small.spec))
    few = execute(case, start_from=f"{case.family}.safetensors", targets="to_q, x_block.attn.qkv, img_attn.qkv")
    found["targets"] = comfy_lora.error(lambda: sessions._load(few.spec))
    return found


def from_diffusers(root: Path) -> dict[str, float]:
    """A LoRA of the diffusers policy on the same network, whose q, k and v are apart, does the same here."""
    folder = comfy_lora.model_folder("sd3", root)
    theirs = load_policy(folder, rank=4, alpha=8.0, dtype="float32")
    randomise(theirs)
    theirs.save_lora(root / "loras" / "theirs.safetensors")
    case = Case("sd3")
    handle = execute(case, start_from="theirs.safetensors", rank=12, alpha=12.0)
    ours = sessions._load(handle.spec).policy
    x, t, _ = case.inputs()
    tensors = case.clip.tensors("red").expand(3).tensors
    with torch.no_grad():
        found = ours.predict(x, t, ours.encode(["red"])[0].expand(3))
        expected = theirs.network(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=tensors["tokens"],
            pooled_projections=tensors["pooled"],
            return_dict=False,
        )[0]
    return {"same": difference(found, expected), "effect": difference(expected, case.reference())}


def refused(case: Case, unet: Case, root: Path) -> dict[str, str]:
    """Files that cannot be continued."""
    pair = {".lora_A.weight": torch.ones(2, 8), ".lora_B.weight": torch.ones(8, 2)}
    one = "diffusion_model.joint_blocks.0.x_block.attn.proj"
    kernel = {".lora_down.weight": torch.ones(2, 8, 1, 1), ".lora_up.weight": torch.ones(8, 2, 1, 1)}
    files = {
        "kernel": {f"lora_unet_down_blocks_0_attentions_0_proj_in{key}": value for key, value in kernel.items()},
        "other": {f"diffusion_model.elsewhere{key}": value for key, value in pair.items()},
        "text": {f"lora_te1_text_model_encoder_layers_0_self_attn_q_proj{key}": value for key, value in pair.items()},
        "shape": {f"{one}{key}": value for key, value in pair.items()},
        "dora": {**{f"{one}{key}": value for key, value in pair.items()}, f"{one}.dora_scale": torch.ones(8)},
    }
    found = {"gone": native_node.NativePolicyNode.validate_inputs(run="a", start_from="gone.safetensors")}
    for name, state in files.items():
        save_file(state, root / "loras" / f"bad_{name}.safetensors")
        spec = execute(unet if name == "kernel" else case, start_from=f"bad_{name}.safetensors").spec
        found[name] = comfy_lora.error(lambda spec=spec: sessions._load(spec))
    return found


# --- conditionings ---------------------------------------------------------------------------------------------------


_cached: list[Any] = []


def chain(**prompts: Given) -> Any:
    """What a chain of nodes gives out, kept as ComfyUI keeps it."""
    found = None
    for text, conditioning in prompts.items():
        found = native_node.ConditionedPrompt.execute(conditioning, text, found).result[0]
    _cached.append(found)
    return found


def conditioned(case: Case, conditionings: Any, negative: Given, **inputs: Any) -> tuple[Any, Any]:
    """The policy and the prompts that the node gives out."""
    with torch.inference_mode():
        node = native_node.NativePolicyConditioning
        node.hidden = types.SimpleNamespace(unique_id="2")
        given = {**WIDGETS, "per_iteration": 2, "order_seed": 0, **inputs}
        return node.execute(case.model, case.vae, conditionings, negative, **given).result


def texts_of(case: Case, *texts: str) -> list[Given]:
    with torch.inference_mode():
        return [case.clip.encode_from_tokens_scheduled(text) for text in texts]


def prediction(handle: Any, case: Case, text: str) -> Tensor:
    x, t, _ = case.inputs()
    policy = sessions._load(handle.spec).policy
    with torch.no_grad(), policy.using(None):
        return policy.predict(x, t, policy.encode([text])[0].expand(3))


def conditioning(case: Case) -> dict[str, Any]:
    """The same as with a CLIP for the same conditionings; and what another one changes."""
    red, blue, none = texts_of(case, "red", "blue", "")
    red_again, blue_again = texts_of(case, "red", "blue")
    handle, prompts = conditioned(case, chain(red=red, blue=blue), none)
    by_clip = execute(case)
    after, state = step(handle, 0)
    _, state_clip = step(by_clip, 0)
    other, _ = conditioned(case, chain(red=blue, blue=red), none)
    rounded = [[red[0][0] + 1e-3 * (torch.arange(7) == 5).view(1, 7, 1), red[0][1]]]  # one token's numbers
    return {
        "prompts": [[p.text for p in prompts.prompts], prompts.per_iteration, prompts.seed],
        "same_state": same(state, state_clip),
        "other_root": other.spec.model.path != handle.spec.model.path,
        "one_token": conditioned(case, chain(red=rounded, blue=blue), none)[0].spec != handle.spec,
        "other_negative": conditioned(case, chain(red=red, blue=blue), red)[0].spec != handle.spec,
        "named_alike": conditioned(case, chain(red=red_again, blue=blue_again), none)[0].spec == handle.spec,
        "resumed": step(sessions.resolve(handle, 0), 0)[0] == after,
    }  # fmt: skip


def sentences(case: Case) -> dict[str, str]:
    """What is said of texts without a conditioning."""
    red, none = texts_of(case, "red", "")
    kept = chain(red=red)
    handle, _ = conditioned(case, kept, none)

    def draw(text: str, **settings: Any) -> str:
        rollout = RolloutConfig(group_size=2, steps=2, solver="euler", **{"cfg": 1.0, **settings})
        sampler = values.Sampler(rollout, 8 * SIDE, 8 * SIDE)
        return comfy_lora.error(lambda: sessions.draw(handle, [(0, Prompt(text))], sampler, 0, lambda: None))

    found = {"unknown": draw("green"), "negative": draw("red", cfg=2.0, negative_prompt="ugly")}
    found["twice"] = comfy_lora.error(lambda: chain(red=red).and_then("red ", red))
    found["empty"] = comfy_lora.error(lambda: kept.and_then(" ", red))
    return found


def ranges(case: Case) -> dict[str, float]:
    """Conditionings for a part of the picture, and for a part of the noise levels, beside each other in one batch."""
    red, blue, none = texts_of(case, "red", "blue", "")
    left = core.ConditioningSetArea().append(red, 8 * SIDE // 2, 8 * SIDE, 0, 0, 1.0)[0]
    right = core.ConditioningSetArea().append(blue, 8 * SIDE // 2, 8 * SIDE, 8 * SIDE // 2, 0, 1.0)[0]
    middle = 0.4 if case.family == "sd15" else 0.75  # between the two noise levels of the batch, by the schedule
    early = core.ConditioningSetTimestepRange().set_range(red, 0.0, middle)[0]
    late = core.ConditioningSetTimestepRange().set_range(blue, middle, 1.0)[0]
    handle, _ = conditioned(case, chain(areas=left + right, times=early + late, red=red, blue=blue), none)
    found = {text: prediction(handle, case, text) for text in ("areas", "times", "red", "blue")}
    x, t, _ = case.inputs()
    policy = sessions._load(handle.spec).policy
    with torch.no_grad(), policy.using(None):  # ComfyUI shows the network its part of the picture alone
        halves = [
            policy.predict(part, t, policy.encode([text])[0].expand(3))
            for part, text in zip(x.chunk(2, dim=3), ("red", "blue"), strict=True)
        ]
    return {
        "areas": difference(found["areas"], torch.cat(halves, dim=3)),
        "early": difference(found["times"][:1], found["red"][:1]),  # t = 700 of 1000
        "late": difference(found["times"][1:], found["blue"][1:]),  # t = 300
        "texts": difference(found["red"], found["blue"]),
    }


def controlled(case: Case) -> dict[str, Any]:
    """Training with a ControlNet on the conditioning, which gets no gradient itself."""
    config = case.native.model.model_config.unet_config
    others = ("out_channels", "transformer_depth_output", "disable_unet_model_creation", "dtype", "device")
    config = {key: value for key, value in config.items() if key not in others}
    kinds = {"hint_channels": 3, "dtype": torch.float32, "device": CPU, "operations": comfy.ops.disable_weight_init}
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        net = comfy.cldm.cldm.ControlNet(**config, **kinds)
        for parameter in net.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    control = comfy.controlnet.ControlNet(net, load_device=CPU)
    red, none = texts_of(case, "red", "")
    hint = torch.rand(1, 8 * SIDE, 8 * SIDE, 3, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        steered = core.ControlNetApply().apply_controlnet(red, control, hint, 1.0)[0]
        weaker = core.ControlNetApply().apply_controlnet(red, control, hint, 0.5)[0]
    handle, _ = conditioned(case, chain(steered=steered, red=red), none)
    differs = difference(prediction(handle, case, "steered"), prediction(handle, case, "red"))
    policy = sessions._load(handle.spec).policy
    randomise(policy)
    _, grads, _ = case.gradients(policy, "steered")
    policy.to("cpu")
    policy.hooks.checkpointing = not policy.hooks.checkpointing
    return {
        "effect": differs,
        "reached": sum(bool(g.abs().max() > 0) for g in grads.values()),
        "checkpointed": worst(case.gradients(policy, "steered")[1], grads),
        "others": sum(p.grad is not None for p in net.parameters()),
        "strength": conditioned(case, chain(steered=weaker, red=red), none)[0].spec != handle.spec,
    }  # fmt: skip


# --- a MODEL ---------------------------------------------------------------------------------------------------------


def model(case: Case) -> dict[str, Any]:
    """The MODEL with the LoRA: plain, what the trained policy predicts, and the base left alone."""
    before = case.drawn()
    handle, _ = step(execute(case), 0)
    with torch.inference_mode():
        patched = native_node.PolicyModel.execute(handle, "current").result[0]
    drawn = case.drawn(patched)
    embedded = replace(handle.spec, source="files", model=replace(handle.spec.model, path="embedded"))
    other = sessions.store(embedded).at(0)
    x, t, _ = case.inputs()
    policy = sessions._load(handle.spec).policy
    with torch.no_grad():
        trained = policy.predict(x, t, policy.encode(["red"])[0].expand(3))
    loaded = case.native.predict(patched, x, t, case.clip.tensors("red").expand(3))
    return {
        "patches": len(patched.patches),
        "differs": not torch.equal(drawn, before),
        "untrained": comfy_lora.error(lambda: native_node.PolicyModel.execute(execute(case), "current")),
        "plain": not patched.injections and not patched.object_patches,
        "loaded": difference(loaded, trained),
        "base": bool(torch.equal(case.drawn(), before)),
        "other_policy": comfy_lora.error(lambda: native_node.PolicyModel.execute(other, "ema")),
    }


def settings_of_patches(case: Case) -> dict[str, bool]:
    """A patch's settings change the name of a MODEL, and only they do."""

    def guided(multiplier: float) -> Any:
        def rescaled(args: dict[str, Any]) -> Tensor:
            return args["cond"] * multiplier

        changed = case.model.clone()
        changed.set_model_sampler_cfg_function(rescaled)
        return changed

    names = [execute(case, guided(multiplier)).spec.model.path for multiplier in (0.5, 0.5, 0.7)]
    without = execute(case).spec.model.path
    return {"same": names[0] == names[1], "other": names[0] != names[2], "none": without != names[0]}


def main() -> None:
    torch.set_num_threads(1)
    register()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "loras").mkdir()
        folder_paths.set_output_directory(name)
        folder_paths.add_model_folder_path("loras", str(root / "loras"))
        cases = {family: Case(family) for family in ("sd15", "sdxl", "sd3", "flux")}
        found: dict[str, Any] = {"dropout": {family: dropout(case) for family, case in cases.items()}}
        found["starting"] = {family: starting(case, root) for family, case in cases.items()}
        found["from_diffusers"] = from_diffusers(root)
        found["refused"] = refused(cases["sd3"], cases["sd15"], root)
        found["conditioning"] = {family: conditioning(cases[family]) for family in ("sdxl", "sd3")}
        found["sentences"] = sentences(cases["sd3"])
        found["ranges"] = {family: ranges(cases[family]) for family in ("sd15", "flux")}
        found["weighted"] = weighted()
        found["controlled"] = controlled(cases["sd15"])
        found["model"] = {family: model(case) for family, case in cases.items()}
        found["patches"] = settings_of_patches(cases["sd15"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
