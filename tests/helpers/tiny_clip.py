"""A tiny random CLIPModel in transformers' format: the architecture and the files of CLIP-L and PickScore."""

from pathlib import Path

import torch
from tiny import MAX_TOKENS, tokenizer
from transformers import CLIPConfig, CLIPModel

SIDE = 32
"""Height and width of what the model sees, pixels."""
WIDTH = 16
"""Numbers in an embedding."""


def save(folder: Path, seed: int = 0, side: int = SIDE) -> Path:
    """Builds a model and its tokenizer and saves both in `folder`, which is returned."""
    tok = tokenizer(folder / "bpe")
    tok.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **sizes,
        "vocab_size": len(tok),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
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
