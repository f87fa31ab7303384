"""How much memory a training step of full-size models keeps for its backward, counted without computing anything.

Run in ComfyUI's folder and interpreter: `python <this file> --cpu`. The networks are on torch's "meta" device, with one
picture of 1024 x 1024 pixels and a LoRA of rank 32: what autograd saves has sizes there, and no numbers. Prints what is
kept without and with gradient checkpointing, and what the policy reserves for it, in units of the memory that ComfyUI
reserves to draw such a picture.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy_native_models  # noqa: F401 - first: it finds ComfyUI

# isort: split
import comfy.model_management
import comfy.supported_models as supported
import torch
from comfy.ldm.flux.model import FluxParams
from torch import Tensor, nn

from dgpo_core.policy.families.hidream import mix_experts
from dgpo_core.policy.frozen_linear import LoraBank

native_hooks = importlib.import_module("pack.on_model.hooks")
native_counting = importlib.import_module("pack.on_model.counting")
native_attention = importlib.import_module("pack.on_model.attention")
native_policy = importlib.import_module("pack.on_model.policy")
META = torch.device("meta")
SDXL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4], "use_spatial_transformer": True, "legacy": False, "num_classes": "sequential",
    "adm_in_channels": 2816, "context_dim": 2048, "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "use_linear_in_transformer": True, "num_head_channels": 64, "use_temporal_attention": False,
    "use_temporal_resblock": False,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768,
    "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19,
    "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
HIDREAM = {
    "image_model": "hidream", "patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096],
    "axes_dims_rope": [64, 32, 32], "llama_layers": [*range(32), *[31] * 16],
}  # fmt: skip
WAN = {"image_model": "wan2.1", "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}


def _flux() -> Any:
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    return supported.Flux({**FLUX, **newer})


MODELS: dict[str, tuple[Callable[[], Any], int, tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "SDXL": (lambda: supported.SDXL(dict(SDXL)), 4, (), {"context": (77, 2048), "y": (2816,)}),
    "Flux": (_flux, 16, (), {"context": (512, 4096), "y": (768,), "guidance": ()}),
    "Qwen-Image": (lambda: supported.QwenImage({"image_model": "qwen_image"}), 16, (1,), {"context": (256, 3584)}),
    "HiDream-I1": (
        lambda: supported.HiDream(dict(HIDREAM)),
        16,
        (),
        {"context": (128, 4096), "y": (2048,), "encoder_hidden_states_llama3": (32, 128, 4096)},
    ),
    "Wan 2.1 1.3B": (lambda: supported.WAN21_T2V(dict(WAN)), 16, (1,), {"context": (512, 4096)}),
}
"""Settings, channels, frames, and the shapes of what the network is given beside latent and time."""


class Attention(torch.autograd.Function):
    """Keeps what flash attention keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, out)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return (None,) * 4


def attention(_: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **options: Any) -> Tensor:
    out = torch.empty_like(q)
    if options.get("skip_reshape"):
        out = out.transpose(1, 2).flatten(2)
    return Attention.apply(q, k, v, out)


class Kept:
    """Bytes of the storages that were saved, each once, beside the network's own parameters."""

    def __init__(self, network: nn.Module) -> None:
        self.seen = {p.untyped_storage()._cdata: p for p in network.parameters()}
        self.bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = tensor  # held: or its address would be the next one's
            self.bytes += storage.nbytes()
        return tensor


@contextmanager
def counted(kept: Kept) -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        yield


def measure(name: str) -> dict[str, float]:
    """In units of `memory_required`: what is kept for the backward, plain and checkpointed, and what is reserved.

    Checkpointed are kept every block's inputs, and in the backward what one block saves.
    """
    make, channels, frames, given = MODELS[name]
    settings = make()
    settings.set_inference_dtype(torch.bfloat16, None)
    model = settings.get_model({}, device=META).to(META)
    network = model.diffusion_model.requires_grad_(False)
    mix_experts(network)
    bank = LoraBank(native_hooks.target_shapes(network, ()), rank=32, alpha=64, seed=0, device=META)
    hooks = native_hooks.Hooks(network, bank)
    hooks._inject(META)
    total, inputs, blocks = Kept(network), Kept(network), []
    for block in native_hooks._blocks(network):
        block.forward = _watched(block.forward, network, inputs, blocks)
    x = torch.empty(1, channels, *frames, 128, 128, device=META, dtype=torch.bfloat16)
    rest = {key: torch.empty(1, *shape, device=META, dtype=torch.bfloat16) for key, shape in given.items()}
    options = {"optimized_attention_override": attention}
    with native_policy.differentiable(), counted(total):
        network(x, torch.empty(1, device=META), **rest, transformer_options=options)
    unit = model.memory_required(x.shape)
    return {
        "unit_gb": unit / 1e9,
        "blocks": len(blocks),
        "plain": (total.bytes + sum(blocks)) / unit,
        "checkpointed": (total.bytes + inputs.bytes + max(blocks)) / unit,
        "reserved": [_reserved(hooks, checkpointing) for checkpointing in (False, True)],
        "counted": [
            count(model, (channels, *frames, 128, 128), given, checkpointing) / unit for checkpointing in (False, True)
        ],
    }


def count(model: Any, shape: tuple[int, ...], given: dict[str, tuple[int, ...]], checkpointing: bool) -> float:
    """Bytes of activations of a forward and its backward, as the policy counts them; it takes the attention of CUDA."""
    names = {"context": "c_crossattn"}
    given = {names.get(key, key): torch.empty(1, *part, device=META) for key, part in given.items()}
    bank = {"shapes": native_hooks.target_shapes(model.diffusion_model, ()), "rank": 32, "alpha": 64}
    start = time.monotonic()
    found = native_counting.count(model, shape, given, bank, torch.bfloat16, checkpointing, native_attention.attention)
    print(f"counted in {time.monotonic() - start:.1f} s", file=sys.stderr)
    return found.update.peak["activations"]


def _reserved(hooks: Any, checkpointing: bool) -> float:
    hooks.checkpointing = checkpointing
    return hooks.backward_units


def _watched(forward: Callable, network: nn.Module, inputs: Kept, blocks: list[int]) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                inputs(value)
        args, kwargs = native_hooks._copied((args, kwargs), tensors=True)  # as a checkpointed block gets them
        own = Kept(network)
        with counted(own):
            result = forward(*args, **kwargs)
        blocks.append(own.bytes)
        return result

    return run


def main() -> None:
    # what a GPU would have: flash attention, whose memory is linear in the number of tokens
    comfy.model_management.pytorch_attention_flash_attention = lambda: True
    print(json.dumps({name: measure(name) for name in MODELS}))


if __name__ == "__main__":
    main()
