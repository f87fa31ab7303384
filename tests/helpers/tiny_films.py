"""Tiny random pipelines that make films."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tiny_parts import film_vae, tokenizer
from transformers import UMT5Config, UMT5EncoderModel


def wan(folder: Path, **scheduler: Any) -> WanPipeline:
    """Wan 2.1; CLIP's tokenizer stands in for UMT5's."""
    return _pipeline(folder, film_vae(AutoencoderKLWan, scale_factor_spatial=2), scheduler)


def wan22(folder: Path, **scheduler: Any) -> WanPipeline:
    """Wan 2.2 TI2V-5B, whose VAE takes 2 x 2 pixels for one, and whose network is told the time of each patch."""
    own_vae = film_vae(
        AutoencoderKLWan,
        decoder_base_dim=16,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=4,
    )
    return _pipeline(folder, own_vae, scheduler, expand_timesteps=True)


def _pipeline(folder: Path, vae: AutoencoderKLWan, scheduler: dict[str, Any], **options: Any) -> WanPipeline:
    torch.manual_seed(0)
    tok = tokenizer(folder / "tok")
    transformer = WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        rope_max_seq_len=64,
    )
    text = UMT5Config(vocab_size=len(tok), d_model=32, d_ff=32, d_kv=8, num_heads=4, num_layers=1)
    return WanPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae,
        text_encoder=UMT5EncoderModel(text),
        tokenizer=tok,
        **options,
    )
