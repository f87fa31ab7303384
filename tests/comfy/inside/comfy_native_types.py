"""Run by `test_native_types.py` in ComfyUI's folder and interpreter: number types and memory, printed as JSON.

A MODEL's weights are kept in bf16, fp8 and scaled fp8 as its loaders keep them, or are loaded in part and patched where
they are used, or lie in pages that are taken back; gradients are compared with plain autograd on the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfy_native_case import Case, native_policy, randomise, worst  # first: it finds ComfyUI
from comfy_native_models import PLANS, SCALED, stands_for

# isort: split
import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from comfy_lora import difference
from torch import Tensor, nn

KINDS = ("bfloat16", "float8_e4m3fn", SCALED)
PLACES = ("sd15", "flux", "qwen", "hidream", "wan")


def kept(family: str, kind: str) -> Case:
    """A case whose MODEL has weights of that kind, and whose plain copy has the numbers that they stand for."""
    case = Case(family)
    weights = case.plain.model.diffusion_model.state_dict()
    with torch.inference_mode():
        case.native = PLANS[family].kept(kind, weights)
    case.model = case.native.patcher()
    case.plain.model.diffusion_model.load_state_dict(stands_for(case.native.model.diffusion_model))
    return case


def patch(case: Case, seed: int) -> Any:
    """The MODEL with a LoRA of the user's on it."""
    policy = case.policy(seed=seed)
    randomise(policy)
    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(case.model, None, policy.lora_tensors(), 0.5, 0)[0]


def merge(case: Case, patched: Any) -> None:
    """The user's LoRA in the weights of the plain copy, by ComfyUI's own arithmetic."""
    network = case.plain.model.diffusion_model
    with torch.no_grad():
        for key, patches in patched.patches.items():
            weight = network.get_parameter(key.removeprefix("diffusion_model."))
            weight.copy_(comfy.lora.calculate_weight(patches, weight.clone(), key))


def compared(case: Case, policy: Any) -> dict[str, Any]:
    """Predictions and gradients against plain autograd, with and without checkpointing."""
    randomise(policy)
    expected, grads = case.plain_gradients(policy)
    found, ours, saved = case.gradients(policy)
    policy.to("cpu")
    policy.enable_gradient_checkpointing()
    again, ours_again, _ = case.gradients(policy)
    policy.to("cpu")
    return {
        "prediction": difference(found, expected),
        "gradient": worst(ours, grads),
        "checkpointed": [difference(again, found), worst(ours_again, ours)],
        "saved": saved,
    }


def typed(family: str, kind: str) -> dict[str, Any]:
    """Weights of another type."""
    case = kept(family, kind)
    before = case.drawn()
    x, t, _ = case.inputs()
    cond = case.clip.tensors("red").expand(3)
    base = case.native.predict(case.model, x, t, cond)
    policy = case.policy()
    policy.load()
    with policy.using(None), native_policy.differentiable(), torch.no_grad():
        hooked = case.native.call(policy.patcher.model.diffusion_model, x, t, cond.tensors)
    found = compared(case, policy)
    linear = next(m for m in case.native.model.diffusion_model.modules() if type(m).__name__ == "Linear")
    return {
        **found,
        "same_forward": bool(torch.equal(hooked, base)),
        "plain_linear": isinstance(linear, nn.Linear),
        "scaled": getattr(linear, "scale_weight", None) is not None or "Quantized" in type(linear.weight).__name__,
        "restored": bool(torch.equal(case.drawn(), before)),
    }


@contextmanager
def budget(size: int) -> Iterator[None]:
    """ComfyUI loads at most so many bytes of a model, as on a card with too little memory; it never does on a CPU."""
    own = comfy.model_management.LoadedModel.model_load

    def load(self: Any, lowvram_model_memory: float = 0, force_patch_weights: bool = False) -> Any:
        return own(self, max(0.1, size - self.model_loaded_memory()), force_patch_weights)

    comfy.model_management.LoadedModel.model_load = load
    try:
        yield
    finally:
        comfy.model_management.LoadedModel.model_load = own


def partly(case: Case) -> dict[str, Any]:
    """A MODEL with a LoRA on it of which a third is loaded; the rest is cast and patched where it is used."""
    patched = patch(case, seed=9)
    with budget(case.native.patcher().model_size() // 3):
        before = case.drawn(patched)
        policy = case.policy(patched)
        policy.load()
        layers = list(policy.patcher.model.diffusion_model.modules())
        counts = {
            "cast": sum(getattr(m, "comfy_cast_weights", False) for m in layers),
            "patched_on_the_fly": sum(bool(getattr(m, "weight_function", ())) for m in layers),
            "loaded": sum(getattr(m, "comfy_patched_weights", False) for m in layers),
        }
        merge(case, patched)
        return {**compared(case, policy), **counts, "restored": bool(torch.equal(case.drawn(patched), before))}


def partly_scaled(family: str) -> dict[str, Any]:
    """The same on scaled fp8, whose patched weights ComfyUI may round again: they are what the layers do to a one."""
    case = kept(family, SCALED)
    patched = patch(case, seed=9)
    with budget(case.native.patcher().model_size() // 3):
        case.drawn(patched)  # loads it
        case.plain.model.diffusion_model.load_state_dict(acting(case.native.model.diffusion_model), strict=False)
        return compared(case, case.policy(patched))


@torch.no_grad()
def acting(network: nn.Module) -> dict[str, Tensor]:
    """The weights of its Linears as they act."""
    found = {}
    for name, module in network.named_modules():
        if type(module).__name__ == "Linear":
            rows = torch.eye(module.in_features)
            found[f"{name}.weight"] = (module(rows) - module(torch.zeros_like(rows))).T
    return found


def multiplied_in_fp8(family: str) -> dict[str, Any] | None:
    """Newer cards round what goes into a quantised layer, too; the reference is ComfyUI's own backward of that."""
    if not hasattr(comfy.ops, "QuantizedTensor"):
        return None
    case = kept(family, SCALED)
    case.plain = PLANS[family].kept(SCALED, PLANS[family].random().model.diffusion_model.state_dict())
    case.plain.model.requires_grad_(False)
    for model in (case.native.model, case.plain.model):
        for module in model.modules():
            if hasattr(module, "_full_precision_mm"):
                module._full_precision_mm = False
    exact = kept(family, SCALED).reference()
    return {**compared(case, case.policy()), "rounding": difference(case.reference(), exact)}


@contextmanager
def pages(network: nn.Module) -> Iterator[list[str]]:
    """Every layer's weight is in a page that another layer's is written over as soon as it has been given back."""
    layers = {
        m: n
        for n, m in network.named_modules()
        if hasattr(m, "comfy_cast_weights") and m._parameters.get("weight") is not None
    }
    own, own_back, log = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight, []

    def lend(module: Any, *args: Any, **kwargs: Any) -> Any:
        given = own(module, *args, **kwargs)
        if module not in layers or not hasattr(module, "_v"):
            return given
        assert len(given) == 3, "never given back"
        log.append(layers[module])
        page = [None if part is None else part.clone() for part in given[:2]]
        return (*page, given[2])

    def take_back(module: Any, weight: Tensor, bias: Tensor | None, rest: Any) -> None:
        if module in layers and hasattr(module, "_v"):
            log.remove(layers[module])
            for part in (weight, bias):
                if part is not None:
                    part.fill_(torch.nan)
        own_back(module, weight, bias, rest)

    casts = {module: module.comfy_cast_weights for module in layers}
    for module in layers:
        module._v, module.comfy_cast_weights = object(), True
    comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight = lend, take_back
    try:
        yield log
    finally:
        comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight = own, own_back
        for module, cast in casts.items():
            del module._v
            module.comfy_cast_weights = cast


def paged(case: Case) -> dict[str, Any] | None:
    """Weights that are gone a moment after they were used, which is what newer ComfyUIs' dynamic VRAM amounts to."""
    if not hasattr(comfy.ops, "uncast_bias_weight"):
        return None
    with pages(case.native.model.diffusion_model) as out:
        found = compared(case, case.policy())
        kept_out = list(out)
        whole = all(
            hasattr(m, "_v")
            for m in case.native.model.diffusion_model.modules()
            if getattr(m, "comfy_cast_weights", False)
        )
    return {**found, "not_given_back": kept_out, "restored": whole}


def reserving() -> dict[str, list[float]]:
    """What is reserved at which step, in units of what ComfyUI reserves for a forward of one row."""
    case = Case("qwen")
    policy = case.policy()
    unit = case.native.model.memory_required([1, *case.shape])
    own, asked = comfy.model_management.load_models_gpu, []

    def load(models: Any, memory_required: float = 0, **rest: Any) -> None:
        asked.append(memory_required / unit)
        own(models, memory_required=memory_required, **rest)

    def predict(rows: int) -> list[float]:
        asked.clear()
        policy.predict(x[:rows], t[:rows], policy.encode(["red"])[0].expand(rows))
        return list(asked)

    x, t, _ = case.inputs()
    comfy.model_management.load_models_gpu = load
    try:
        with torch.no_grad():
            found = {"forward": predict(2), "smaller": predict(1)}
        found |= {"training": predict(2), "again": predict(2), "more": predict(3)}
        policy.to("cpu")
        policy.enable_gradient_checkpointing()
        return found | {"checkpointed": predict(2)}
    finally:
        comfy.model_management.load_models_gpu = own
        policy.to("cpu")


def recomputing() -> dict[str, int]:
    """How often the blocks run in a backward, as it is turned on and off between two steps without a pause."""
    case = Case("qwen")
    policy, found = case.policy(), {}
    blocks = case.native.model.diffusion_model.transformer_blocks

    def backward() -> int:
        ran: list[Any] = []
        handles = [block.attn.register_forward_pre_hook(lambda module, _: ran.append(module)) for block in blocks]
        case.gradients(policy)
        for handle in handles:
            handle.remove()
        return len(ran) - len(blocks)  # of the forward

    found["at first"] = backward()
    policy.enable_gradient_checkpointing()
    found["on"] = backward()
    policy.disable_gradient_checkpointing()
    found["off"] = backward()
    policy.to("cpu")
    return found


def main() -> None:
    torch.set_num_threads(1)
    found = {
        "recomputing": recomputing(),
        "types": {f"{family} {kind}": typed(family, kind) for family in ("qwen", "hidream", "wan") for kind in KINDS},
        "partly": {**{family: partly(Case(family)) for family in PLACES}, SCALED: partly_scaled("qwen")},
        "fp8 products": {"qwen": multiplied_in_fp8("qwen")},
        "reserving": reserving(),
        "paged": {family: paged(Case(family)) for family in PLACES},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
