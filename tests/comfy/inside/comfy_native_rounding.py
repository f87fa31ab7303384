"""What becomes of a LoRA when ComfyUI's loader rounds the patched weights to the type that a model is kept in.

Run in ComfyUI's folder and interpreter: `python <this file> --cpu`. The embedded model is kept in each type; a policy
on it has a random LoRA of three strengths, and the saved file is applied by ComfyUI's own loader, to weights that are
loaded, or where weights are used, as it is when a model does not fit. Prints, by type and by the LoRA's effect on the
prediction (as a share of it), the loader's error as a share of that effect.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfy_native_case import native_policy, randomise  # first: it finds ComfyUI
from comfy_native_models import Plan
from comfy_native_types import KINDS, budget

# isort: split
import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.supported_models as supported
import comfy_lora
import torch
from torch import Tensor

STRENGTHS = (0.1, 0.3, 1.0)
TEXT = "two red circles"


def texts(engine: Any) -> Callable[[str], Any]:
    """From any text to what the embedded model's own text encoder makes of TEXT, as CONDITIONING."""
    cond = engine.encode([TEXT])[0].tensors
    return lambda _: [[cond["tokens"], {"pooled_output": cond["pooled"]}]]


def predictions(policy: Any, model: Any, x: Tensor, t: Tensor, lora: bool) -> Tensor:
    """Of a policy on `model`, with its LoRA or without."""
    with torch.no_grad(), policy.using("current" if lora else None):
        found = policy.predict(x, t, policy.encode([TEXT])[0].expand(len(x)))
    policy.to("cpu")
    return found


def share(a: Tensor, b: Tensor) -> float:
    """|a| / |b|"""
    return float(a.norm() / b.norm())


def measure(kind: str, weights: dict[str, Tensor], encode: Callable[[str], Any]) -> list[dict[str, float]]:
    config = comfy.model_detection.detect_unet_config(weights, "")
    with torch.inference_mode():
        native = Plan(lambda: supported.SD3(dict(config))).kept(kind, weights)
    native.model.latent_format.latent_channels = weights["x_embedder.proj.weight"].shape[1]
    model = native.patcher()

    def policy(on: Any) -> Any:
        return native_policy.NativePolicy(on, encode, None, rank=16, alpha=16.0, targets=(), seed=0)

    side = 16
    x = torch.randn(
        4, native.model.latent_format.latent_channels, side, side, generator=torch.Generator().manual_seed(1)
    )
    t = torch.tensor([900.0, 700.0, 400.0, 200.0])
    trained = policy(model)
    base = predictions(trained, model, x, t, lora=False)
    rows = []
    for strength in STRENGTHS:
        randomise(trained)
        with torch.no_grad():
            for key, parameter in trained.trainable().items():
                parameter.mul_(strength if "lora_B" in key else 0.3)
        wanted = predictions(trained, model, x, t, lora=True)
        with torch.inference_mode():
            loaded = comfy.sd.load_lora_for_models(model, None, trained.lora_tensors(), 1.0, 0)[0]
        whole = predictions(policy(loaded), loaded, x, t, lora=False)
        with torch.inference_mode():
            comfy.model_management.unload_all_models()
        with budget(1):
            where_used = predictions(policy(loaded), loaded, x, t, lora=False)
        with torch.inference_mode():
            comfy.model_management.unload_all_models()
        effect = wanted - base
        errors = {"loaded": share(whole - wanted, effect), "where_used": share(where_used - wanted, effect)}
        rows.append({"effect": share(effect, base), **errors})
    return rows


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        native, engine = comfy_lora.both("embedded", Path(name))
        weights = native.model.diffusion_model.state_dict()
        found = {kind: measure(kind, weights, texts(engine)) for kind in ("float32", *KINDS)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
