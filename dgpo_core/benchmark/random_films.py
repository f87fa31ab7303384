"""Models of films of real size with random weights; see `random_model`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

from dgpo_core.benchmark import random_parts as parts
from dgpo_core.policy.loading.tensors import cast

_WAN = {  # huggingface.co/Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json; the rest as the class has it
    "num_layers": 30,
    "num_attention_heads": 12,
    "ffn_dim": 8960,
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
        text_encoder=parts.t5(dtype, device, UMT5EncoderModel, words=256384),
        tokenizer=parts.tokenizer(512),
    )
