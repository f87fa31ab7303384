"""Run by `test_native_gguf.py` in ComfyUI's folder and interpreter: MODELs of GGUF files, printed as JSON."""

from __future__ import annotations

import importlib
import json
from typing import Any

from comfy_native_case import Case  # first: it finds ComfyUI
from comfy_native_models import PLANS
from comfy_native_types import compared, merge, patch

# isort: split
import torch
from comfy_gguf_layers import GGMLOps, GGUFModelPatcher, packed
from comfy_lora import CPU
from torch import Tensor

KINDS = ("Q8_0", "Q4_0", "Q5_1")
fingerprint = importlib.import_module("pack.common.fingerprint").fingerprint


def kept(family: str, kind: str) -> Case:
    """A case whose MODEL is as ComfyUI-GGUF loads it, and whose plain copy has the numbers that its bytes stand for."""
    case = Case(family)
    weights = case.plain.model.diffusion_model.state_dict()
    settings = PLANS[family].settings()
    settings.custom_operations = GGMLOps
    settings.set_inference_dtype(torch.float32, torch.float32)
    with torch.inference_mode():
        case.native = PLANS[family].native(settings)
        network = case.native.model.diffusion_model
        missing, unexpected = network.load_state_dict(
            {key: packed(value, kind) for key, value in weights.items()}, strict=False
        )
        assert not missing + unexpected, (missing, unexpected)
    case.native.patcher = lambda: GGUFModelPatcher(case.native.model, load_device=CPU, offload_device=CPU)
    case.model = case.native.patcher()
    case.plain.model.diffusion_model.load_state_dict(stands_for(network), strict=False)
    return case


@torch.no_grad()
def stands_for(network: Any) -> dict[str, Tensor]:
    found = {}
    for name, module in network.named_modules():
        if hasattr(module, "is_ggml_quantized") and module.is_ggml_quantized():
            weight, _ = module.cast_bias_weight(dtype=torch.float32, device=CPU, bias_dtype=torch.float32)
            found[f"{name}.weight"] = weight.clone()
    return found


def counted(case: Case) -> int:
    return sum(
        hasattr(m, "is_ggml_quantized") and m.is_ggml_quantized() for m in case.native.model.diffusion_model.modules()
    )


def trained(family: str, kind: str) -> dict[str, Any]:
    """As a file has it, and with a LoRA of the user's on it."""
    case = kept(family, kind)
    before = case.drawn()
    found = compared(case, case.policy())
    return {**found, "packed": counted(case), "restored": bool(torch.equal(case.drawn(), before))}


def patched(family: str, kind: str) -> dict[str, Any]:
    case = kept(family, kind)
    model = patch(case, seed=9)
    before = case.drawn(model)
    policy = case.policy(model)
    merge(case, model)
    return {**compared(case, policy), "restored": bool(torch.equal(case.drawn(model), before))}


def told_apart() -> list[str]:
    """What runs go by: the same file twice, and another one."""
    return [fingerprint(kept("qwen", kind).model) for kind in ("Q8_0", "Q8_0")] + [fingerprint(other().model)]


def other() -> Case:
    case = kept("qwen", "Q8_0")
    with torch.inference_mode():
        for parameter in case.native.model.diffusion_model.parameters():
            parameter.data.view(-1)[0] += 1
    return case


def main() -> None:
    torch.set_num_threads(1)
    found = {f"{family} {kind}": trained(family, kind) for family in ("qwen", "lumina") for kind in KINDS}
    print(json.dumps({"trained": found, "patched": patched("qwen", "Q8_0"), "names": told_apart()}))


if __name__ == "__main__":
    main()
