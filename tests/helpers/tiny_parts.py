"""The small parts that tiny pipelines are made of: tokenizers, text encoders and a VAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

SIZE = 32
"""Height and width of the images, pixels: latents of 16 x 16 (the tiny VAEs halve once)."""
MAX_TOKENS = 16


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A real CLIP byte-pair tokenizer with a vocabulary of letters and three merges."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,."
    words = [*letters, *(c + "</w>" for c in letters), "re", "red</w>", "blue</w>", "bl", "ue</w>"]
    vocab = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    merges = ["#version: 0.2", "r e", "re d</w>", "b l", "u e</w>", "bl ue</w>"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS)


def clip(tok: CLIPTokenizer, cls: type = CLIPTextModel, width: int = 32, positions: int = MAX_TOKENS) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        projection_dim=width,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    return cls(config)


def t5(words: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=words, d_model=32, d_ff=32, d_kv=8, num_heads=4, num_layers=1, tie_word_embeddings=False
    )  # fmt: skip
    return T5EncoderModel(config)


def film_vae(cls: type, **changes: Any) -> Any:
    """A VAE of films of 4 channels, which halves once."""
    return cls(
        **{
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [False],
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [1.5, 2.0, 1.0, 0.5],
            **changes,
        }
    )


def vae(channels: int, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=SIZE,
        scaling_factor=1.5,
        shift_factor=shift,
        mid_block_add_attention=False,
    )


def talking(tok: CLIPTokenizer) -> CLIPTokenizer:
    """The same tokenizer for a language model that prompts are put to as messages."""
    tok.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}a"
    return tok
