"""Run by `test_native.py` in ComfyUI's folder and interpreter: models of real size, trained as MODELs, as JSON.

Weights are random. Each model is trained for an iteration, and then goes forward and back with all of its weights on
the card, and with so little room that part of them stays in main memory. `--dynamic` before ComfyUI's own options: with
its dynamic VRAM, where there is one. On a CPU the models are narrow: a try of this file.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

DYNAMIC = "--dynamic" in sys.argv
if DYNAMIC:
    sys.argv.remove("--dynamic")
    import comfy_aimdo.control

    comfy_aimdo.control.init()  # before torch
sys.path.insert(0, str(Path(__file__).parents[1] / "comfy" / "inside"))
from comfy_native_case import randomise, worst  # noqa: E402 - it finds ComfyUI
from comfy_native_models import vae  # noqa: E402
from comfy_native_reserve import FLUX, SDXL, supported  # noqa: E402

# isort: split
import comfy.memory_management  # noqa: E402
import comfy.model_management as management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import torch  # noqa: E402
from bright import Bright  # noqa: E402
from torch import Tensor  # noqa: E402

from dgpo_core.common.prompts import Prompt  # noqa: E402
from dgpo_core.method.trainer import Trainer  # noqa: E402
from dgpo_core.settings.config import Config, DataConfig, RewardTerm, RolloutConfig, TrainingConfig  # noqa: E402

native_policy = importlib.import_module("pack.on_model.policy")
if DYNAMIC:
    comfy_aimdo.control.init_devices((torch.cuda.current_device(),))
    comfy.memory_management.aimdo_enabled = True
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
DEVICE = management.get_torch_device()
GIB = 2**30
SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "use_spatial_transformer": True, "legacy": False, "context_dim": 768, "num_heads": 8,
    "adm_in_channels": None, "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "use_linear_in_transformer": False,
    "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
ZIMAGE = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560, "n_layers": 30,
    "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "qk_norm": True, "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512], "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
    "ffn_dim_multiplier": 8 / 3,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """settings: ComfyUI's; side: pixels; tokens, width, pooled: of a text; small: what to change for a try."""

    settings: Callable[[dict[str, Any]], Any]
    config: dict[str, Any]
    side: int
    tokens: int
    width: int
    pooled: int
    channels: str  # the family whose latents it shares
    images: int = 4


PLANS = {
    "sd15": Plan(supported.SD15, SD15, 512, 77, 768, 768, "sd15", 8),
    "sdxl": Plan(supported.SDXL, SDXL, 1024, 77, 2048, 1280, "sdxl"),
    "zimage": Plan(getattr(supported, "ZImage", None), ZIMAGE, 1024, 128, 2560, 2560, "zimage", 2),
    "flux": Plan(supported.Flux, {**FLUX, "txt_ids_dims": []}, 512, 512, 4096, 768, "zimage", 2),
}


def patcher(plan: Plan) -> Any:
    """The MODEL as its loader gives it: the weights in main memory, in 16 bits, for the card."""
    settings = plan.settings(dict(plan.config))
    dtype = (
        torch.float32
        if DEVICE.type != "cuda"
        else torch.float16
        if plan.settings in (supported.SD15, supported.SDXL)
        else torch.bfloat16
    )
    settings.set_inference_dtype(dtype, None)
    with torch.inference_mode():
        model = settings.get_model({}, device="cpu").eval()
        for name, value in model.diffusion_model.state_dict().items():
            value.copy_(filled(name, value))
    make = comfy.model_patcher.CoreModelPatcher if DYNAMIC else comfy.model_patcher.ModelPatcher
    return make(model, load_device=DEVICE, offload_device=torch.device("cpu"))


def filled(name: str, value: Tensor) -> Tensor:
    """Matrices that keep the size of what they are given, norms near one, biases small."""
    noise = torch.randn(value.shape, device=DEVICE)
    if value.ndim > 1 and name.endswith("weight"):
        return noise / value[0].numel() ** 0.5
    return 1 + 0.1 * noise if name.endswith("weight") else 0.02 * noise


def encoder(plan: Plan) -> Callable[..., Any]:
    def encode(text: str) -> Any:
        generator = torch.Generator().manual_seed(len(text))
        tokens = torch.randn(1, plan.tokens, plan.width, generator=generator)
        return [[tokens, {"pooled_output": torch.randn(1, plan.pooled, generator=generator)}]]

    return encode


@contextmanager
def room(bytes_: float | None) -> Iterator[None]:
    """ComfyUI takes at most so much of the card, as with --reserve-vram."""
    before, free = management.EXTRA_RESERVED_VRAM, management.get_free_memory(DEVICE)
    if bytes_:
        management.EXTRA_RESERVED_VRAM = max(before, free - bytes_)
    try:
        yield
    finally:
        management.EXTRA_RESERVED_VRAM = before


def taken(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, its seconds, and the most GiB of tensors meanwhile."""
    if DEVICE.type != "cuda":  # a try
        start = time.perf_counter()
        return work(), time.perf_counter() - start, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = work()
    torch.cuda.synchronize()
    return found, time.perf_counter() - start, torch.cuda.max_memory_allocated() / GIB


def gradients(policy: Any, plan: Plan, rows: int) -> dict[str, Tensor]:
    """Of the adapter, for latents and times that are always the same."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, *policy.latent_shape(plan.side, plan.side), generator=generator)
    t = torch.full((rows,), 500.0)
    for parameter in policy.trainable().values():
        parameter.grad = None
    policy.predict(x, t, policy.encode(["a lamp"])[0].expand(rows)).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in policy.trainable().items()}


def once(policy: Any, plan: Plan, rows: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    gradients(policy, plan, rows)  # loads, and warms up
    found, seconds, peak = taken(lambda: gradients(policy, plan, rows))
    inside = policy.patcher.loaded_size() / GIB
    return found, {
        "seconds": seconds, "peak": peak, "weights": inside, "of": policy.patcher.model_size() / GIB,
        "reserved": policy._reserved / GIB, "beside": peak - inside,
    }  # fmt: skip


def forward_and_back(model: Any, plan: Plan, checkpointing: bool) -> dict[str, Any]:
    """With all weights there, and with half of them."""
    policy = native_policy.NativePolicy(
        model, encoder(plan), vae(plan.channels), rank=32, alpha=64.0, targets=(), seed=0
    )
    if checkpointing:
        policy.enable_gradient_checkpointing()
    randomise_small(policy)
    whole, all_there = once(policy, plan, 1)
    policy.to("cpu")
    management.unload_all_models()
    management.soft_empty_cache()
    with room(policy.patcher.model_size() / 2 + policy._reserved + 0.5 * GIB):
        part, partly = once(policy, plan, 1)
    policy.to("cpu")
    management.unload_all_models()
    management.soft_empty_cache()
    return {
        "whole": all_there, "partly": partly, "differs": worst(part, whole),
        "size": max(float(value.abs().max()) for value in whole.values()),
    }  # fmt: skip


@torch.no_grad()
def randomise_small(policy: Any) -> None:
    randomise(policy)
    for parameter in policy.trainable().values():
        parameter.mul_(0.1)


def trained(model: Any, plan: Plan) -> dict[str, Any]:
    """One iteration after a first, of one group, as the Training Loop does it."""
    policy = native_policy.NativePolicy(
        model, encoder(plan), vae(plan.channels), rank=32, alpha=64.0, targets=(), seed=0
    )
    policy.enable_gradient_checkpointing()
    config = Config(
        reward=(RewardTerm("bright"),),
        data=DataConfig(groups_per_iteration=1),
        rollout=RolloutConfig(solver="dpmpp_2m", steps=4, cfg=2.0,
                              group_size=plan.images, batch=plan.images),
        training=TrainingConfig(timesteps=2, t_min=0.0, micro_batch=plan.images, clip=0.0, kl_weight=1e-3),
    )  # fmt: skip
    trainer = Trainer(policy, [Prompt("a lamp")], {"bright": Bright()}, config, size=(plan.side, plan.side))
    trainer.iterate()
    found, seconds, peak = taken(trainer.iterate)
    policy.to("cpu")
    return {
        "seconds": seconds, "peak": peak, "phases": found.seconds, "loss": found.metrics["loss"],
        "grad_norm": found.metrics["grad_norm"],
    }  # fmt: skip


def main() -> None:
    names = os.environ.get("SIZES", " ".join(PLANS)).split()
    found: dict[str, Any] = {"dynamic": DYNAMIC}
    for name in names:
        plan = PLANS[name]
        if DEVICE.type != "cuda":  # a try
            narrow = {"model_channels": 64, "depth": 2, "depth_single_blocks": 2, "n_layers": 1, "n_refiner_layers": 1}
            own = {key: narrow.get(key, value) for key, value in plan.config.items()}
            plan = replace(plan, config=own, side=64, images=2)
        if plan.settings is None:
            continue
        try:
            model = patcher(plan)
            found[name] = {
                "trained": trained(model, plan),
                "checkpointing": forward_and_back(model, plan, True),
                "kept": forward_and_back(model, plan, False),
            }
            del model
        except Exception as error:
            import traceback

            found[name] = {"failed": f"{type(error).__name__}: {error}", "where": traceback.format_exc()[-2500:]}
        management.unload_all_models()
        gc.collect()
        management.soft_empty_cache()
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
