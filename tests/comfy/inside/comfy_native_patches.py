"""Run by `test_native_patches.py` in ComfyUI's folder and interpreter: prints what it saw there, as JSON.

What other nodes put on a MODEL and on its CONDITIONING, beside what is trained, on a small random SD1.5.
"""

from __future__ import annotations

import gc
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

from comfy_native_case import Case, native_texts, randomise, worst  # first: it finds ComfyUI

# isort: split
import comfy.controlnet
import comfy.gligen
import comfy.hooks
import comfy.model_patcher
import comfy_lora
import folder_paths
import torch
from comfy_lora import difference
from comfy_native_forms import Reading, chain, conditioned, texts_of
from comfy_native_node import sessions
from comfy_networks import CPU
from torch import Tensor

fingerprint = importlib.import_module("pack.common.fingerprint").fingerprint


def behind(node: str, model: Any, *widgets: Any) -> Any:
    """The MODEL behind a node of ComfyUI's, "module.Class" of comfy_extras."""
    module, _, name = node.partition(".")
    cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    with torch.inference_mode():
        run = cls.execute if hasattr(cls, "execute") else getattr(cls(), cls.FUNCTION)
        out = run(model, *widgets)
        return out[0] if isinstance(out, tuple) else out.result[0]


def levels(case: Case) -> dict[str, float]:
    """Deep Shrink, which is for the noisiest levels alone, on a batch of several."""
    shrunk = behind(
        "nodes_model_downscale.PatchModelAddDownscale", case.model, 1, 2.0, 0.0, 0.35, True, "bicubic", "bicubic"
    )
    policy = case.policy(shrunk)
    x, t, _ = case.inputs()
    cond = policy.encode(["red"])[0]
    with torch.no_grad():
        together = policy.predict(x, t, cond.expand(3))
        alone = torch.cat([policy.predict(x[i : i + 1], t[i : i + 1], cond) for i in range(3)])
    policy.to("cpu")
    plain = case.reference()
    return {
        "rows": difference(together, alone),
        "noisiest": difference(alone[:1], plain[:1]),  # t = 700 of 1000, where it works
        "cleanest": difference(alone[1:], plain[1:]),  # t = 300, where it does not
    }


def lots(case: Case) -> dict[str, Any]:
    """Token merging, which draws lots."""
    policy = case.policy(behind("nodes_tomesd.TomePatchModel", case.model, 0.3))
    randomise(policy)
    x, t, _ = case.inputs()
    red, none = (policy.encode([text])[0] for text in ("red", ""))
    before = torch.get_rng_state()
    found, grads, _ = case.gradients(policy)
    again, grads_again, _ = case.gradients(policy)
    drawn = [policy.sample(policy.solver("euler", 3, 128, 128), x[:1], red, none, 4.0, lambda: None) for _ in range(2)]
    untouched = bool(torch.equal(torch.get_rng_state(), before))
    policy.to("cpu")
    policy.enable_gradient_checkpointing()
    checkpointed = case.gradients(policy)[1]
    with torch.no_grad():
        alone = torch.cat([policy.predict(x[i : i + 1], t[i : i + 1], red) for i in range(3)])
    policy.to("cpu")
    plain = case.policy()
    randomise(plain)
    effect = difference(found, case.gradients(plain)[0])
    plain.to("cpu")
    return {
        "effect": effect,
        "repeats": difference(again, found),
        "gradient": worst(grads_again, grads),
        "checkpointed": worst(checkpointed, grads),
        "rows": difference(found, alone),
        "drawn": difference(*drawn),
        "untouched": untouched,
    }


def overridden(case: Case) -> dict[str, Any]:
    """An attention that gives no gradient back, and one that does."""

    def with_gradient(func: Any, *args: Any, **kwargs: Any) -> Tensor:
        return func(*args, **kwargs)

    @torch.no_grad()
    def without(func: Any, *args: Any, **kwargs: Any) -> Tensor:
        return func(*args, **kwargs)

    found: dict[str, Any] = {}
    plain = case.policy()
    randomise(plain)
    expected = case.gradients(plain)[1]
    plain.to("cpu")
    for name, override in (("with", with_gradient), ("without", without)):
        model = case.model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        policy = case.policy(model)
        randomise(policy)
        if name == "with":
            found[name] = worst(case.gradients(policy)[1], expected)
        else:
            found[name] = comfy_lora.error(lambda policy=policy: case.gradients(policy))
        policy.to("cpu")
    return found


def grounded(case: Case, red: Any) -> str:
    """GLIGEN, whose layers lie between those of the MODEL."""
    with torch.inference_mode():
        widths = [m.attn1.to_q.weight.shape[1] for m in case.native.model.modules() if hasattr(m, "attn1")]
        fusers = [comfy.gligen.GatedSelfAttentionDense(width, 32, 2, width // 2) for width in widths]
        net = comfy.gligen.Gligen(fusers, comfy.gligen.PositionNet(32, 32), 32)
        for parameter in net.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
        patcher = comfy.model_patcher.ModelPatcher(net, CPU, CPU)
        boxes = "position", patcher, [(torch.randn(1, 32), 8, 8, 0, 0)]
        given = [[tokens, {**more, "gligen": boxes}] for tokens, more in red]
    handle, _ = conditioned(case, chain(boxes=given, red=red), red)
    policy = sessions._load(handle.spec).policy
    randomise(policy)
    said = comfy_lora.error(lambda: case.gradients(policy, "boxes"))
    policy.to("cpu")
    return said


def hooked(case: Case, red: Any) -> dict[str, str]:
    """A LoRA that a hook puts on while one CONDITIONING is looked at."""
    pair = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(32, 2)}
    lora = {f"diffusion_model.input_blocks.1.1.proj_in.{key}": value for key, value in pair.items()}
    group = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
    given = comfy.hooks.set_hooks_for_conditioning(red, group)
    clip = Reading()
    clip.apply_hooks_to_conds = group
    return {
        "prompt": comfy_lora.error(lambda: conditioned(case, chain(hooked=given, red=red), red)),
        "clip": comfy_lora.error(lambda: native_texts.by_clip(clip)),
        "negative": conditioned(case, chain(red=red), given)[0].spec.source,
    }


def told_apart(red: Any) -> dict[str, bool]:
    """Settings of a CLIP and of a ControlNet that are in no weight of theirs."""
    clip = Reading()
    names = [native_texts.by_clip(clip).fingerprint]
    for options in ({}, {"t5xxl_min_length": 512}):
        clip.tokenizer_options = options
        names.append(native_texts.by_clip(clip).fingerprint)
    control = comfy.controlnet.ControlNet(torch.nn.Linear(2, 2), load_device=CPU)
    kinds = [fingerprint(control)]
    for kind in ([], [1], [2]):
        control.set_extra_arg("control_type", kind)
        kinds.append(fingerprint(control))
    loras = [
        fingerprint(comfy.controlnet.ControlLora({"input_hint_block.0.weight": torch.full((2, 2), value)}))
        for value in (1.0, 1.0, 2.0)
    ]
    return {
        "without_options": names[0] == names[1],
        "options": names[1] != names[2],
        "types": len(set(kinds)) == 4,
        "loras": loras[0] == loras[1] != loras[2],
    }


def gathered(case: Case) -> list[int]:
    """How many tensors there are after more and more forwards behind EasyCache; none where ComfyUI has it not."""
    if not importlib.util.find_spec("comfy_extras.nodes_easycache"):
        return []
    policy = case.policy(behind("nodes_easycache.EasyCacheNode", case.model, 0.2, 0.15, 0.95, False))
    x, t, _ = case.inputs()
    cond = policy.encode(["red"])[0].expand(3)
    found = []
    for _ in range(3):
        with torch.no_grad():
            policy.predict(x, t, cond)
        gc.collect()
        found.append(sum(issubclass(type(one), Tensor) for one in gc.get_objects()))
    policy.to("cpu")
    return found


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder_paths.set_output_directory(str(Path(name)))
        case = Case("sd15")
        (red,) = texts_of(case, "red")
        found = {
            "levels": levels(case),
            "lots": lots(case),
            "overridden": overridden(case),
            "grounded": grounded(case, red),
            "hooked": hooked(case, red),
            "apart": told_apart(red),
            "gathered": gathered(case),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
