"""The parts of models of real size with random weights: backbones, VAEs, tokenizers and text encoders.

Where nothing has storage (device "meta") text encoders are whole; else they have the real output widths, one small
layer and a vocabulary of letters.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, T5EncoderModel

from dgpo_core.demo.text import make_tokenizer
from dgpo_core.policy.loading.tensors import cast


def backbone(cls: type, config: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Any:
    """`cls` with torch's own initialisation, whose forwards stay finite through all layers.

    It is made on `device` in `dtype`: Flux in float32 would be 48 GB of host memory.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return cast(cls(**config), dtype)  # SD3 makes its table of positions in float32 whatever the default
    finally:
        torch.set_default_dtype(default)


def vae(
    dtype: torch.dtype,
    channels: int,
    device: torch.device | str,
    scale: float,
    shift: float | None = None,
    upcast: bool = True,
) -> AutoencoderKL:
    """The VAE of 84 million parameters that all have, but for its latents: vae/config.json of the model cards."""
    with place_of(device):
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=channels,
            use_quant_conv=channels == 4,  # those of 16 channels have none
            use_post_quant_conv=channels == 4,
            sample_size=1024,
            scaling_factor=scale,
            shift_factor=shift,
            force_upcast=upcast,
        ).to(dtype)


def place_of(device: torch.device | str) -> torch.device:
    """Where all but the backbone is made."""
    return torch.device("meta" if torch.device(device).type == "meta" else "cpu")


def tokenizer(length: int, text: str = "") -> Any:
    """A tokenizer that knows letters, two words and those of `text`, and pads to `length` tokens; CLIP's kind stands in
    for T5's."""
    made = make_tokenizer(["a picture", text])
    made.model_max_length = length
    return made


_CLIP = {  # of SDXL base 1.0 (and of SD2.1: 1024), text_encoder*/config.json: layers, heads, inner width
    768: (12, 12, 3072, "quick_gelu"),
    1024: (23, 16, 4096, "gelu"),
    1280: (32, 20, 5120, "gelu"),
}
_T5_XXL = {  # text_encoder_2/config.json of FLUX.1-dev; text_encoder/config.json of Wan 2.1, but for its words
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}


def clip(cls: type, width: int, dtype: torch.dtype, device: torch.device | str, positions: int = 77) -> Any:
    """A CLIP text encoder: width 768 is CLIP-L, 1024 CLIP-H but for its last layer, 1280 CLIP-G; with storage, of one
    layer in place of theirs."""
    letters, whole = tokenizer(77), place_of(device).type == "meta"
    layers, heads, inner, activation = _CLIP[width] if whole else (1, width // 64, width, "quick_gelu")
    config = CLIPTextConfig(
        vocab_size=49408 if whole else len(letters),
        hidden_size=width,
        intermediate_size=inner,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        max_position_embeddings=positions,
        bos_token_id=letters.bos_token_id,
        eos_token_id=letters.eos_token_id,
        pad_token_id=letters.pad_token_id,
    )
    with place_of(device):
        return cls(config).to(dtype)


def t5(dtype: torch.dtype, device: torch.device | str, cls: Any = T5EncoderModel, words: int = 32128) -> Any:
    """The encoder of T5-XXL, or of another class and vocabulary; with storage, of its width with one layer of one
    head."""
    small = {"d_model": 4096, "d_ff": 64, "d_kv": 64, "num_heads": 1, "num_layers": 1}
    place = place_of(device)
    config = {"vocab_size": words, **_T5_XXL} if place.type == "meta" else {"vocab_size": len(tokenizer(512)), **small}
    with place:
        return cls(cls.config_class(**config)).to(dtype)
