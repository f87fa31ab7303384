"""Run by `test_comfy_native.py` in ComfyUI's folder and interpreter: prints what the native policy did there, as JSON.

For each family, a small random network is put into ComfyUI's own class with weights as its loaders make them (inference
tensors), and a policy on it is compared with plain autograd on a second copy of the same weights.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))
import utils.install_util  # noqa: F401 - before another module that is called `utils` hides ComfyUI's

# isort: split
import comfy_lora

# isort: split
import comfy.latent_formats
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.sd
import comfy.taesd.taesd
import comfy.utils
import diffusers
import folder_paths
import torch
from bright import Bright, register
from comfy_lora import CPU, Native, difference
from torch import Tensor, nn

from dgpo_core.config import Config, DataConfig, RewardTerm, RolloutConfig, TrainingConfig
from dgpo_core.policy import Cond
from dgpo_core.prompts import Prompt
from dgpo_core.trainer import Trainer

native_policy = importlib.import_module("pack.native_policy")
native_models = importlib.import_module("pack.native_models")
native_node = importlib.import_module("pack.native")
sessions = importlib.import_module("pack.sessions")
values = importlib.import_module("pack.values")
FAMILIES = os.environ.get("FAMILIES", "sd15 sdxl sd3 flux").split()
SIDE = 16  # latent height and width
SDXL = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 6 * 256 + 32}
FLUX = {
    "patch_size": 1, "in_channels": 16, "num_layers": 3, "num_single_layers": 3, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}  # fmt: skip
WIDTHS = {"sd15": (32, 32), "sdxl": (64, 32), "sd3": (64, 64), "flux": (32, 32)}
"""By family, the width of a text's tokens and of its pooled output."""


# --- small models ----------------------------------------------------------------------------------------------------


class Clip:
    """Stands in for ComfyUI's CLIP: a text's tokens are noise that its letters seed."""

    def __init__(self, family: str) -> None:
        self.widths, self.layer_idx = WIDTHS[family], None
        torch.manual_seed(0)
        self.patcher = comfy.model_patcher.ModelPatcher(nn.Linear(2, 2), CPU, CPU)

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list[Any]:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        tokens = torch.randn(1, 7, self.widths[0], generator=torch.Generator().manual_seed(seed))
        return [[tokens, {"pooled_output": tokens[:, 0, :1].expand(1, self.widths[1]) * 0.1}]]

    def tensors(self, text: str) -> Cond:
        [[tokens, rest]] = self.encode_from_tokens_scheduled(text)
        return Cond({"tokens": tokens, "pooled": rest["pooled_output"]})


def network(family: str) -> Any:
    torch.manual_seed(1)
    if family == "flux":
        return diffusers.FluxTransformer2DModel(**FLUX)
    if family == "sdxl":
        settings = {**comfy_lora.unet(sdxl=True).config, **SDXL}
        return diffusers.UNet2DConditionModel.from_config(settings)
    return comfy_lora.FAMILIES[family][0]()


def native(family: str) -> Native:
    """The family's network in ComfyUI's class. Every call makes the same weights."""
    built = network(family)
    made = comfy_lora.FAMILIES[family][1](built)
    made.model.latent_format = comfy.latent_formats.SD15()  # the small networks have four channels
    if family == "sdxl":
        sizes = torch.tensor([8 * SIDE, 8 * SIDE, 0, 0, 8 * SIDE, 8 * SIDE]).float()
        times = built.add_time_proj(sizes).reshape(1, -1)

        def call(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            y = torch.cat([cond["pooled"].expand(len(x), -1), times.expand(len(x), -1)], 1)
            return model(x, t, context=cond["tokens"], y=y)

        made.call = call
    return made


def vae() -> Any:
    """A real VAE of ComfyUI's, the smallest there is, with random weights."""
    generator = torch.Generator().manual_seed(4)
    empty = comfy.taesd.taesd.TAESD(latent_channels=4).state_dict()
    return comfy.sd.VAE(sd={key: 0.05 * torch.randn(v.shape, generator=generator) for key, v in empty.items()})


class Case:
    """A family's MODEL, CLIP and VAE as loader nodes give them, and a policy on them."""

    def __init__(self, family: str) -> None:
        self.family, self.clip = family, Clip(family)
        with torch.inference_mode():
            self.native, self.vae = native(family), vae()
        self.model = self.native.patcher()
        self.plain = native(family)
        self.plain.model.requires_grad_(False)

    def policy(self, model: Any = None, **settings: Any) -> Any:
        given = {"rank": 4, "alpha": 8.0, "targets": (), "seed": 0, **settings}
        return native_policy.NativePolicy(model or self.model, self.clip, self.vae, **given)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t and the loss's weights for three rows."""
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(3, 4, SIDE, SIDE, generator=generator)
        return x, torch.tensor([700.0, 300.0, 300.0]), torch.randn(x.shape, generator=generator)

    def reference(self, adapter: dict[str, Tensor] | None = None, scale: float = 2.0) -> Tensor:
        """What plain autograd makes of the second copy, with `adapter` beside its Linears, for one text."""
        x, t, _ = self.inputs()
        cond = self.clip.tensors("red").expand(3).tensors
        handles = []
        for name, module in self.plain.model.diffusion_model.named_modules():
            if adapter and f"{name}.lora_A.weight" in adapter:
                pair = adapter[f"{name}.lora_A.weight"], adapter[f"{name}.lora_B.weight"]
                handles.append(module.register_forward_hook(branch(*pair, scale)))
        try:
            return self.plain.call(self.plain.model.diffusion_model, x, t, cond)
        finally:
            for handle in handles:
                handle.remove()

    def drawn(self, model: Any = None) -> Tensor:
        """What KSampler draws, in inference mode as ComfyUI runs it."""
        with torch.inference_mode():
            latent = torch.zeros(1, 4, SIDE, SIDE)
            texts = [self.clip.encode_from_tokens_scheduled(text) for text in ("red", "")]
            noise = comfy.sample.prepare_noise(latent, 5)
            return comfy.sample.sample(
                model or self.model, noise, 3, 4.0, "euler", "normal", *texts, latent, disable_pbar=True, seed=5
            )


def branch(a: Tensor, b: Tensor, scale: float) -> Callable[[Any, Any, Tensor], Tensor]:
    return lambda module, given, output: output + scale * (given[0] @ a.T @ b.T)


def randomise(policy: Any) -> None:
    """An adapter that does something."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


# --- what is looked at -----------------------------------------------------------------------------------------------


def gradients(case: Case, policy: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    """The policy's prediction and its adapter's gradients, and how many of the base's weights autograd had saved."""
    x, t, weights = case.inputs()
    base = {p.data_ptr() for m in case.native.model.modules() if hasattr(m, "in_channels") or hasattr(m, "in_features")
            for p in m.parameters(recurse=False)}  # fmt: skip
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v.data_ptr()) or v, lambda v: v)
    for parameter in policy.trainable().values():
        parameter.grad = None
    with hooks:
        found = policy.predict(x, t, policy.encode(["red"])[0].expand(3))
    (found * weights).sum().backward()
    return found.detach(), {key: p.grad for key, p in policy.trainable().items()}, len(base.intersection(saved))


def plain_gradients(case: Case, policy: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from plain autograd, told to bear the networks' writing in place."""
    adapter = {key: p.detach().clone().requires_grad_() for key, p in policy.trainable().items()}
    with torch.autograd.graph.allow_mutation_on_saved_tensors(), native_policy.differentiable():
        found = case.reference(adapter)
        (found * case.inputs()[2]).sum().backward()
    return found.detach(), {key: p.grad for key, p in adapter.items()}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, as a share of its largest value."""
    size = max(float(value.abs().max()) for value in theirs.values())
    return max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) / size


def training(case: Case) -> dict[str, Any]:
    """Gradients against plain autograd, with and without checkpointing."""
    policy = case.policy()
    x, t, _ = case.inputs()
    cond = policy.encode(["red"])[0].expand(3)
    with torch.no_grad(), policy.using(None):
        base = difference(policy.predict(x, t, cond), case.reference())
    randomise(policy)
    expected, grads = plain_gradients(case, policy)
    found, ours, saved = gradients(case, policy)
    policy.to("cpu")
    policy.enable_gradient_checkpointing()
    found_again, ours_again, _ = gradients(case, policy)
    blocks = len(importlib.import_module("pack.native_hooks")._blocks(case.native.model.diffusion_model))
    others = [
        *case.native.model.parameters(),
        *policy.adapter_state("old").values(),
        *policy.adapter_state("ema").values(),
    ]
    policy.to("cpu")
    return {
        "base": base,
        "prediction": difference(found, expected),
        "effect": difference(found, case.reference()),
        "gradient": worst(ours, grads),
        "checkpointed": [difference(found_again, found), worst(ours_again, ours)],
        "blocks": blocks,
        "saved": saved,
        "targets": len(ours) // 2,
        "reached": sum(bool(g.abs().max() > 0) for g in ours.values()),
        "others": sum(p.grad is not None for p in others),
    }


def rows(case: Case) -> dict[str, float]:
    """A batch of several texts is the same as its rows alone."""
    policy = case.policy()
    randomise(policy)
    x, t, _ = case.inputs()
    conds = policy.encode(["red", "blue", "red"])
    with torch.no_grad():
        whole = policy.predict(x, t, Cond.cat(conds))
        alone = torch.cat([policy.predict(x[i : i + 1], t[i : i + 1], conds[i]) for i in range(3)])
        policy.to("cpu")
    return {"rows": difference(whole, alone), "texts": difference(whole[1:2], whole[2:3])}


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What ComfyUI logs of LoRA keys that it does not know."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield told
    finally:
        logging.getLogger().removeHandler(handler)


def saving(case: Case, root: Path) -> dict[str, Any]:
    """The file, applied by ComfyUI's own loader, does what the trained model does; on a MODEL with a LoRA, too."""
    policy = case.policy()
    randomise(policy)
    path = root / f"{case.family}.safetensors"
    policy.save_lora(path, {"dgpo.step": "1"})
    state, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    with warnings() as told, torch.inference_mode():
        patched = comfy.sd.load_lora_for_models(case.model, None, state, 1.0, 0)[0]
    x, t, _ = case.inputs()
    cond = policy.encode(["red"])[0].expand(3)
    with torch.no_grad():
        trained = policy.predict(x, t, cond)
        loaded = case.native.predict(patched, x, t, case.clip.tensors("red").expand(3))
        on_top = case.policy(patched, seed=9)
        with on_top.using(None):
            again = on_top.predict(x, t, on_top.encode(["red"])[0].expand(3))
        on_top.to("cpu")
        after = case.native.predict(patched, x, t, case.clip.tensors("red").expand(3))
    return {
        "keys": len(state),
        "patched": len(patched.patches),
        "not_loaded": [line for line in told if "not loaded" in line],
        "loaded": difference(loaded, trained),
        "on_top": difference(again, trained),
        "still_there": bool(torch.equal(after, loaded)),
        "metadata": metadata,
    }


def restoring(case: Case) -> dict[str, bool]:
    """KSampler draws the same before and after a training, also one that an error has cut short."""
    before, keys = case.drawn(), set(case.native.model.state_dict())
    policy = case.policy()
    randomise(policy)
    gradients(case, policy)
    kept = set(case.native.model.state_dict()) == keys
    after = case.drawn()
    policy.patcher.model_options["model_function_wrapper"] = lambda *_: 1 / 0
    failed = False
    try:
        gradients(case, policy)
    except ZeroDivisionError:
        failed = True
    return {
        "after": bool(torch.equal(before, after)),
        "after_error": failed and bool(torch.equal(before, case.drawn())),
        "keys": kept,
        "clean": not any("forward" in vars(m) for m in case.native.model.modules()),
        "inference": all(p.is_inference() for p in case.native.model.diffusion_model.parameters()),
    }


def iterating(case: Case, checkpointing: bool) -> dict[str, Any]:
    """Two iterations of the engine's trainer."""
    before = case.drawn()
    policy = case.policy()
    if checkpointing:
        policy.enable_gradient_checkpointing()
    config = Config(
        reward=(RewardTerm("bright"),),
        data=DataConfig(held_out="", groups_per_iteration=2),
        rollout=RolloutConfig(group_size=4, steps=4, solver="euler", cfg=2.0),
        training=TrainingConfig(timesteps=2, t_min=0.0, lr=1e-2, micro_batch=8),
    )
    size = (8 * SIDE, 8 * SIDE)
    trainer = Trainer(policy, [Prompt("red"), Prompt("blue")], {"bright": Bright()}, config, size=size)
    done = [trainer.iterate() for _ in range(2)]
    policy.to("cpu")
    pixels = done[0].groups[0].images
    again = policy.decode(policy.encode_images(pixels))
    return {
        "metrics": [dict(iteration.metrics) for iteration in done],
        "images": [list(pixels.shape), float(pixels.min()), float(pixels.max()), list(again.shape)],
        "spread": float(pixels.std(0).max()),
        "moved": max(float(p.detach().abs().max()) for key, p in policy.trainable().items() if "lora_B" in key),
        "finite": all(bool(p.isfinite().all()) for p in policy.trainable().values()),
        "restored": bool(torch.equal(case.drawn(), before)),
    }


def kinds(case: Case) -> dict[str, Any]:
    """The MODEL's own noise schedule counts, also one that a node has put on it."""
    v_sampling = type("V", (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION), {})
    v_model = case.model.clone()
    v_model.add_object_patch("model_sampling", v_sampling(case.native.model.model_config, zsnr=True))
    policy = case.policy(v_model)
    x, t, _ = case.inputs()
    with torch.no_grad(), policy.using(None):
        found = policy.predict(x, t, policy.encode(["red"])[0].expand(3))
    policy.to("cpu")
    return {
        "kinds": [case.policy().prediction.name, policy.prediction.name],
        "v": difference(found, case.reference()),
    }


def execute(case: Case, model: Any = None, **inputs: Any) -> Any:
    """What the node gives out, run as ComfyUI runs it."""
    given = {"run": "a_run", "run_seed": 0, "rank": 4, "alpha": 8.0, "targets": "", "gradient_checkpointing": True}
    with torch.inference_mode():
        node = native_node.NativePolicyNode
        return node.execute(model or case.model, case.clip, case.vae, **{**given, **inputs}).result[0]


def step(handle: Any, iteration: int) -> tuple[Any, Any]:
    """One iteration by the steps that the nodes take."""
    sampler = values.Sampler(RolloutConfig(group_size=4, steps=4, solver="euler"), 8 * SIDE, 8 * SIDE)
    training = values.Training(TrainingConfig(timesteps=2, t_min=0.0, lr=1e-2, micro_batch=8))
    with torch.inference_mode():
        groups = sessions.draw(handle, [(0, Prompt("red"))], sampler, iteration, lambda: None)
        scored = sessions.score(groups, (RewardTerm("bright"),))
        after, state = sessions.learn(handle, scored, training, lambda: None)
        sessions.keep(after, state)
    return after, state


def same(a: Any, b: Any) -> bool:
    return set(a.tensors) == set(b.tensors) and all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)


def node(case: Case, root: Path) -> dict[str, Any]:
    """The node, and the steps that other nodes take with its policy."""
    before = case.drawn()
    handle = execute(case)
    first, first_state = step(handle, 0)
    second, second_state = step(first, 1)
    with torch.inference_mode():
        lora = sessions.lora(second, second_state, (), Config(model=second.spec.model), "current")
        patched = comfy.sd.load_lora_for_models(case.model, None, dict(lora), 1.0, 0)[0]
    restored = bool(torch.equal(case.drawn(), before))
    again = Case(case.family)  # the same files, loaded again by another ComfyUI
    sessions._live.clear()
    handle_again = execute(again)
    resumed = step(sessions.resolve(handle_again, 1), 1)
    sessions.store(second.spec).folder.rename(root / "elsewhere")
    anew = step(handle_again, 0)
    lost = native_models.lost()
    native_models.remember(again.model.clone(), again.clip, again.vae)
    gc.collect()
    lost = native_models.lost() - lost
    spec = replace(handle_again.spec, model=replace(handle_again.spec.model, path="SD15-gone"))
    return {
        "steps": [first.step, second.step, second_state.step],
        "moved": not same(first_state, second_state),
        "patched": len(patched.patches),
        "differs": not torch.equal(case.drawn(patched), before),
        "metadata": {key: lora.metadata[key] for key in ("dgpo.base", "dgpo.step", "ss_base_model_version")},
        "restored": restored and bool(torch.equal(case.drawn(), before)),
        "named_alike": handle_again.spec == handle.spec,
        "resumed": resumed[0] == second,
        "anew": same(anew[1], first_state),
        "other_patches": execute(case, patched).spec.model.path != handle.spec.model.path,
        "network": sessions._load(handle_again.spec).policy.patcher.model is again.native.model,
        "lost": lost,
        "gone": comfy_lora.error(lambda: sessions._load(spec)),
        "bad_run": native_node.NativePolicyNode.validate_inputs(run="a/b"),
    }


def cast(dtype: torch.dtype) -> dict[str, float]:
    """Gradients on weights that are kept in another type and cast where they are used."""
    case = Case("sd3")
    with torch.inference_mode():
        case.native = comfy_lora.native_sd3(network("sd3"), dtype)
    case.native.model.latent_format = comfy.latent_formats.SD15()
    case.model = case.native.patcher()
    rounded = {key: value.float() for key, value in case.native.model.diffusion_model.state_dict().items()}
    case.plain.model.diffusion_model.load_state_dict(rounded)
    policy = case.policy()
    randomise(policy)
    expected, grads = plain_gradients(case, policy)
    found, ours, _ = gradients(case, policy)
    policy.to("cpu")
    return {"prediction": difference(found, expected), "gradient": worst(ours, grads)}


def refused(case: Case) -> dict[str, str]:
    """MODELs that cannot be trained on."""
    other = case.model.clone()
    other.add_object_patch("model_sampling", comfy.model_sampling.ModelSamplingContinuousEDM())
    found = {
        "schedule": comfy_lora.error(lambda: case.policy(other)),
        "targets": comfy_lora.error(lambda: case.policy(targets=("nowhere",))),
        "size": comfy_lora.error(lambda: case.policy().latent_shape(100, 128)),
    }
    layer = next(m for m in case.native.model.diffusion_model.modules() if isinstance(m, nn.Linear))
    layer.scale_weight = torch.ones(())
    found["quantised"] = comfy_lora.error(lambda: case.policy())
    del layer.scale_weight
    case.native.model.latent_format = comfy.latent_formats.Wan21()
    found["video"] = comfy_lora.error(lambda: case.policy())
    case.native.model.latent_format = comfy.latent_formats.SD15()
    return found


def hooks_of_others(case: Case) -> dict[str, bool]:
    """Another's forward on a layer is run, and is there afterwards."""
    layer = next(m for m in case.native.model.diffusion_model.modules() if isinstance(m, nn.Linear))
    theirs = functools.partial(lambda original, x: original(x) * 1.5, layer.forward)
    layer.forward = theirs
    policy = case.policy()
    x, t, _ = case.inputs()
    with torch.no_grad(), policy.using(None):
        found = policy.predict(x, t, policy.encode(["red"])[0].expand(3))
        policy.to("cpu")
        there = layer.forward is theirs
        plain = case.native.predict(case.model, x, t, case.clip.tensors("red").expand(3))
    del layer.forward
    return {"run": difference(found, plain) < 1e-5, "there": there}


def texts(case: Case) -> dict[str, Any]:
    """A text is encoded once, and again only after very many others."""
    encoded = []
    policy = case.policy()
    encode, kept = policy._encode, native_policy._KEPT
    policy._encode = lambda text: encoded.append(text) or encode(text)
    native_policy._KEPT = 2
    first = policy.encode(["red"])[0]
    policy.encode(["red", "blue", "red"])
    known = policy.is_encoded(["red", "blue"]), policy.is_encoded(["green"])
    policy.encode(["green", "white"])
    dropped = not policy.is_encoded(["red"])
    x, t, _ = case.inputs()
    with torch.no_grad():
        policy.predict(x[:1], t[:1], first)
    policy.to("cpu")
    native_policy._KEPT = kept
    return {"encoded": encoded, "known": known, "dropped": dropped}


def look(family: str, root: Path) -> dict[str, Any]:
    case = Case(family)
    found = {
        "training": training(case),
        "rows": rows(case),
        "saving": saving(case, root),
        "restoring": restoring(case),
        "iterating": iterating(case, checkpointing=family != "sd15"),
    }
    if family == "sd15":
        more = {"kinds": kinds(case), "texts": texts(case), "others": hooks_of_others(case), "refused": refused(case)}
        found.update(more)
    if family == "sd3":
        types = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
        found.update({name: cast(dtype) for name, dtype in types.items()}, node=node(case, root))
    return found


def main() -> None:
    torch.set_num_threads(1)
    register()
    with tempfile.TemporaryDirectory() as name:
        folder_paths.set_output_directory(name)
        found = {family: look(family, Path(name)) for family in FAMILIES}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
