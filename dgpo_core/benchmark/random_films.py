"""Models of films of real size with random weights; see `random_model`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from dgpo_core.benchmark import random_parts as parts
from dgpo_core.policy.loading.tensors import cast

_WAN = {  # huggingface.co/Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json; the rest as the class has it
    "num_layers": 30,
    "num_attention_heads": 12,
    "ffn_dim": 8960,
}
_UMT5_XXL = {  # text_encoder/config.json
    "vocab_size": 256384,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}


def wan(dtype: torch.dtype, device: torch.device | str, **overrides: Any) -> WanPipeline:
    """Wan 2.1 T2V 1.3B: a transformer of 1.42 billion parameters, and the encoder of UMT5-XXL."""
    return _wan(dtype, device, _WAN | overrides)


def wan_14b(dtype: torch.dtype, device: torch.device | str, **overrides: Any) -> WanPipeline:
    """Wan 2.1 T2V 14B: a transformer of 14.3 billion parameters, whose settings are those of the class."""
    return _wan(dtype, device, overrides)


def _wan(dtype: torch.dtype, device: torch.device | str, config: dict[str, Any]) -> WanPipeline:
    with parts.place_of(device):
        vae = cast(AutoencoderKLWan(), dtype)  # the class's own settings are the published ones
    return WanPipeline(
        transformer=parts.backbone(WanTransformer3DModel, config, dtype, device),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=_umt5(dtype, device),
        tokenizer=parts.tokenizer(512),
    )


def _umt5(dtype: torch.dtype, device: torch.device | str) -> UMT5EncoderModel:
    """The encoder of UMT5-XXL; with storage, of its width with one layer of one head."""
    small = {"d_model": 4096, "d_ff": 64, "d_kv": 64, "num_heads": 1, "num_layers": 1}
    place = parts.place_of(device)
    config = _UMT5_XXL if place.type == "meta" else {"vocab_size": len(parts.tokenizer(512)), **small}
    with place:
        return UMT5EncoderModel(UMT5Config(**config)).to(dtype)
