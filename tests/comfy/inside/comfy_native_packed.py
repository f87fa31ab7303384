"""Run by `test_native_packed.py` in ComfyUI's folder and interpreter: native policies that quantise, as JSON."""

from __future__ import annotations

import json
from typing import Any

from comfy_native_case import Case, randomise  # first: it finds ComfyUI
from comfy_native_types import budget, compared, kept, merge, patch

# isort: split
import comfy_lora
import torch
from comfy_lora import difference

from dgpo_core.policy.quantised import QuantisedLinear

FAMILIES = ("sd15", "flux", "qwen")


def layers(policy: Any) -> dict[str, QuantisedLinear]:
    network = policy.patcher.model.diffusion_model
    return {name: m for name, m in network.named_modules() if isinstance(m, QuantisedLinear)}


@torch.no_grad()
def same_numbers(case: Case, policy: Any) -> float:
    """Gives the plain copy the numbers that the packed layers stand for; how far those are from its own at most."""
    furthest = 0.0
    for name, layer in layers(policy).items():
        weight = case.plain.model.diffusion_model.get_submodule(name).weight
        whole = layer.whole(torch.float32)
        furthest = max(furthest, float((whole - weight).norm() / weight.norm()))
        weight.copy_(whole)
    return furthest


def trained(family: str, kind: str) -> dict[str, Any]:
    case = Case(family)
    before = case.drawn()
    own = {key: value.clone() for key, value in case.native.model.state_dict().items()}
    policy = case.policy(quantize=kind)
    rounding = same_numbers(case, policy)
    found = compared(case, policy)
    ordinary = case.policy()
    return {
        **found,
        "rounding": rounding,
        "layers": len(layers(policy)),
        "kept_whole": [n for n in layers(policy) if "emb_layers" in n or "time_embed" in n],
        "size": policy.patcher.model_size() / ordinary.patcher.model_size(),
        "same_keys": policy.lora_tensors().keys() == ordinary.lora_tensors().keys(),
        "restored": bool(torch.equal(case.drawn(), before)),
        "untouched": all(torch.equal(value, own[key]) for key, value in case.native.model.state_dict().items()),
    }


def patched(family: str) -> dict[str, Any]:
    """With a LoRA of the user's on the MODEL, which is in the packed weights, whatever is loaded meanwhile."""
    case = Case(family)
    model = patch(case, seed=9)
    before = case.drawn(model)  # it is loaded, and its LoRA in its weights
    policy = case.policy(model, quantize="int8")
    merge(case, model)
    rounding = same_numbers(case, policy)
    found = compared(case, policy)
    return {**found, "rounding": rounding, "restored": bool(torch.equal(case.drawn(model), before))}


def partly(family: str) -> dict[str, Any]:
    """Of the packed network a third is loaded; the rest comes where it is used."""
    case = Case(family)
    policy = case.policy(quantize="int8")
    same_numbers(case, policy)
    with budget(policy.patcher.model_size() // 3):
        policy.load()
        left = sum(getattr(m, "prev_comfy_cast_weights", False) for m in layers(policy).values())
        return {**compared(case, policy), "left": left}


def learning(family: str) -> dict[str, float]:
    """A packed base's gradient beside the whole one's, and what is drawn by both."""
    case = Case(family)
    policies = [case.policy(), case.policy(quantize="int8")]
    drawn, gradients = [], []
    for policy in policies:
        randomise(policy)
        _, grads, _ = case.gradients(policy)
        gradients.append(torch.cat([value.flatten() for value in grads.values()]))
        solver, texts = policy.solver("euler", 3, 128, 128), policy.encode(["red", ""])
        noise = torch.randn(2, *case.shape, generator=torch.Generator().manual_seed(1))
        drawn.append(policy.sample(solver, noise, texts[0].expand(2), texts[1], 2.0, lambda: None))
        policy.to("cpu")
    return {"gradient": difference(gradients[1], gradients[0]), "drawn": difference(drawn[1], drawn[0])}


def refused() -> dict[str, str]:
    case = kept("qwen", "float8_e4m3fn")
    return {
        "small": comfy_lora.error(lambda: case.policy(quantize="int8")),
        "unknown": comfy_lora.error(lambda: case.policy(quantize="int3")),
    }


def stays_quantised() -> list[str]:
    """What of a MODEL in fp8 is packed: nothing but what the graph has left whole."""
    case = kept("qwen", "float8_e4m3fn")
    layer = case.native.model.diffusion_model.get_submodule("transformer_blocks.0.attn.to_q")
    with torch.inference_mode():
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.bfloat16), requires_grad=False)
    return list(layers(case.policy(quantize="int8")))


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        f"{family} {kind}": trained(family, kind) for family in FAMILIES for kind in ("fp8", "int8")
    }
    print(
        json.dumps(
            {
                "trained": found,
                "patched": {family: patched(family) for family in ("sd15", "qwen")},
                "partly": {family: partly(family) for family in ("sd15", "qwen")},
                "learning": learning("qwen"),
                "refused": refused(),
                "stays": stays_quantised(),
            }
        )
    )


if __name__ == "__main__":
    main()
