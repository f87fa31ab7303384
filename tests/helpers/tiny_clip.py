"""A tiny random CLIPModel in transformers' format: the architecture and the files of CLIP-L and PickScore."""

from pathlib import Path
from typing import Any

import torch
from tiny import MAX_TOKENS, tokenizer
from transformers import CLIPConfig, CLIPModel

SIDE = 32
"""Height and width of what the model sees, pixels."""
WIDTH = 16
"""Numbers in an embedding."""
WHOLE_HEADS = {"hidden_size": 128, "num_attention_heads": 2}
"""Heads of 64 numbers, as the published CLIP-L has, so that the tensors tell how many there are."""
ALL_WORDS = 49408
"""In the vocabulary of every published CLIP."""


def save(folder: Path, seed: int = 0, side: int = SIDE, words: int = 0, **sizes: Any) -> Path:
    """Builds a model and its tokenizer and saves both in `folder`, which is returned.

    words: that the model knows, if more than its tokenizer has: `ALL_WORDS` for the real one. sizes: of both encoders,
    where they are not the smallest; such as `WHOLE_HEADS`.
    """
    tok = tokenizer(folder / "bpe")
    tok.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **sizes}
    text = {
        **sizes,
        "vocab_size": words or len(tok),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": words - 2 if words else tok.bos_token_id,
        "eos_token_id": words - 1 if words else tok.eos_token_id,
        "pad_token_id": words - 1 if words else tok.pad_token_id,
    }
    torch.manual_seed(seed)
    model = CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config={**sizes, "image_size": side, "patch_size": 8},
            projection_dim=WIDTH,
            logit_scale_init_value=4.0,
        )
    )
    with torch.no_grad():  # as it is initialised, all images look alike to it
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    model.save_pretrained(folder)
    return folder
