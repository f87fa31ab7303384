"""Run by `test_lora_forms.py` in ComfyUI's folder and interpreter: LoRAs of other trainers, as JSON.

Each is read twice: by the LoRA Loader into ComfyUI's class, and as the start of a training into diffusers'.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(Path.cwd()), str(REPO / "tests" / "helpers")]

from comfy_lora import (  # noqa: E402 - first: it finds ComfyUI
    DEMO,
    FAMILIES,
    Native,
    apply,
    both,
    difference,
    error,
    lora_model,
    small_size,
)

# isort: split
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from dgpo_core.policy import load_policy  # noqa: E402


def makers_lora(native: Native, style: str) -> dict[str, Tensor]:
    """A LoRA of rank 2 and alpha 1 of every layer, as the network's makers name it: fused q, k and v, convolutions."""
    generator = torch.Generator().manual_seed(4)
    state: dict[str, Tensor] = {}
    for name, module in native.model.diffusion_model.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        out, into, *kernel = module.weight.shape
        key = f"lora_unet_{name.replace('.', '_')}" if style == "kohya" else f"diffusion_model.{name}"
        down = 0.1 * torch.randn(2, into, *kernel, generator=generator)
        state[f"{key}.lora_down.weight"] = down
        state[f"{key}.lora_up.weight"] = 0.1 * torch.randn(out, 2, *[1] * len(kernel), generator=generator)
        state[f"{key}.alpha"] = torch.tensor(1.0)
    return state


def both_ways(native: Native, family: str, style: str, root: Path) -> dict[str, Any]:
    """The same file through the loader, and as what a training starts from."""
    path = root / "loras" / f"{family}_{style}.safetensors"
    state = makers_lora(native, style)
    save_file(state, path)
    policy = load_policy(DEMO if family == "embedded" else root / family, init_lora=path, dtype="float32")
    cond = policy.encode(["red"])[0]
    x = torch.randn(1, *policy.latent_shape(*small_size(policy)), generator=torch.Generator().manual_seed(3))
    t = torch.tensor([300.0])
    model = native.patcher()
    patched, _, info = apply(model, path.name)
    with torch.no_grad():
        ours = policy.predict(x, t, cond)
        with policy.using(None):
            base = policy.predict(x, t, cond)
    found = native.predict(patched, x, t, cond)
    native.predict(model, x, t, cond)  # takes the patches off again
    return {
        "info": info, "modules": len(state) // 3, "same": difference(found, ours), "effect": difference(ours, base)
    }  # fmt: skip


CASES = REPO / "tests" / "cases" / "loras"
TO_Q = "transformer.transformer_blocks.0.attn.to_q"


def form_cases(natives: dict[str, Native]) -> dict[str, Any]:
    """The loader on forms other than the plain one, on one layer of SD3 [128, 128], and on what cannot be used."""
    model = natives["sd3"].patcher()

    def told(tensors: dict[str, Tensor], module: str = TO_Q) -> str:
        return apply(model, "none", state={f"{module}.{end}": t for end, t in tensors.items()})[2]

    r = torch.randn
    plain = {"lora_A.weight": r(4, 128), "lora_B.weight": r(128, 4)}
    hada = {f"hada_w{i}_{ab}": r(128, 4) if ab == "a" else r(4, 128) for i in (1, 2) for ab in "ab"}
    forms = {
        "plain": plain,
        "alpha of whole numbers": {**plain, "alpha": torch.tensor(4)},
        "DoRA of LyCORIS": {**plain, "dora_scale": r(128, 1)},
        "LoHa": {**hada, "alpha": torch.tensor(2.0)},
        "LoKr": {"lokr_w1": r(4, 4), "lokr_w2_a": r(32, 2), "lokr_w2_b": r(2, 32), "alpha": torch.tensor(2.0)},
        "full": {"diff": r(128, 128)},
    }
    refused = {
        "DoRA of peft": {**plain, "lora_magnitude_vector": r(128)},
        "bias": {**plain, "lora_B.bias": r(128)},
        "IA3": {"weight": r(128), "on_input": torch.zeros(1)},
        "half": {"lora_A.weight": r(4, 128)},
        "half LoHa": {key: hada[key] for key in ("hada_w1_a", "hada_w1_b")},
        "not finite": {**plain, "lora_B.weight": torch.full((128, 4), torch.nan)},
        "infinite": {**plain, "lora_B.weight": torch.full((128, 4), torch.inf)},
        "whole numbers": {**plain, "lora_B.weight": torch.ones(128, 4, dtype=torch.int32)},
        "alpha of three": {**plain, "alpha": torch.ones(3)},
        "alpha that is none": {**plain, "alpha": torch.tensor(torch.nan)},
        "other rank": {**plain, "lora_B.weight": r(128, 3)},
        "no rank": {"lora_A.weight": r(0, 128), "lora_B.weight": r(128, 0)},
    }
    mixed = {f"{TO_Q}.{end}": t for end, t in plain.items()}
    mixed |= {f"{TO_Q.replace('to_q', 'to_k')}.{end}": t for end, t in refused["DoRA of peft"].items()}
    return {
        "applied": {name: told(tensors) for name, tensors in forms.items()},
        "refused": {name: error(lambda tensors=tensors: told(tensors)) for name, tensors in refused.items()},
        "mixed": apply(model, "none", state=mixed)[2],
        "NaN": error(lambda: lora_model.read(CASES / "NaN_inside.safetensors")),
        "alpha": {k: float(t) for k, t in lora_model.read(CASES / "header_alpha.safetensors").items() if "alpha" in k},
    }


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "loras").mkdir()
        folder_paths.add_model_folder_path("loras", str(root / "loras"))
        natives = {family: both(family, root)[0] for family in FAMILIES}
        result = {
            "forms": form_cases(natives),
            "makers": {
                f"{family} {style}": both_ways(native, family, style, root)
                for family, native in natives.items()
                for style in ("kohya", "generic")
            },
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
