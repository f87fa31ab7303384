"""How well a picture fits a prompt, by the embedded model's own knowledge of its world.

A diffusion model that draws by prompts also tells how likely a picture is with its prompt and without: it predicts the
noise in it better where the prompt fits ("Your diffusion model is secretly a zero-shot classifier", arXiv 2303.16203).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dgpo_core.common.seeds import derive_seed, noise

MODEL = Path(__file__).parent / "model"
SIDE = 64  # pixels
LEVELS = (0.6, 0.7, 0.8, 0.9)
"""Noise levels, 0 for the picture alone to 1 for noise alone; below, the picture itself tells what its prompt could."""
TIMESTEPS = 1000  # as the scheduler counts them
BATCH = 128  # pictures per forward


@dataclass(frozen=True)
class _Model:
    """The embedded model in float32 on the CPU. texts: its tokenizers with their encoders."""

    transformer: Any
    vae: Any
    texts: tuple[tuple[Any, Any], ...]


@cache
def _model() -> _Model:
    """Once for the process; part by part, without what a pipeline prints."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    def network(cls: Any, part: str, file: str) -> Any:
        folder = MODEL / part
        config = (
            CLIPTextConfig.from_json_file(folder / "config.json")
            if cls is CLIPTextModelWithProjection
            else cls.load_config(folder)
        )
        made = cls(config) if cls is CLIPTextModelWithProjection else cls.from_config(config)
        made.load_state_dict(load_file(folder / file))
        return made.float().eval().requires_grad_(False)

    return _Model(
        network(SD3Transformer2DModel, "transformer", "diffusion_pytorch_model.safetensors"),
        network(AutoencoderKL, "vae", "diffusion_pytorch_model.safetensors"),
        tuple(
            (
                CLIPTokenizer.from_pretrained(MODEL / f"tokenizer{suffix}"),
                network(CLIPTextModelWithProjection, f"text_encoder{suffix}", "model.safetensors"),
            )
            for suffix in ("", "_2")
        ),
    )


def likeness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """By how much the prompt helps to predict the picture, at each of `LEVELS`: float32 [B, L]; more is a better fit.

    images: float32 [B, 3, 64, 64] in [0, 1] with a prompt each. The noise is the same for every picture and always.
    """
    model = _model()
    found = []
    with torch.inference_mode():
        texts = {text: _encoded(model, text) for text in {*prompts, ""}}
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            x0 = model.vae.encode(images[part] * 2 - 1).latent_dist.mode()
            x0 = (x0 - model.vae.config.shift_factor) * model.vae.config.scaling_factor
            with_prompt = [texts[prompt] for prompt in prompts[part]]
            without = [texts[""]] * len(x0)
            rows = [_error(model, x0, s, without) - _error(model, x0, s, with_prompt) for s in LEVELS]
            found.append(torch.stack(rows, dim=1))
    return torch.cat(found) if found else torch.zeros(0, len(LEVELS))


def _error(model: _Model, x0: Tensor, level: float, texts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean squared error of the predicted velocity of each latent, [B]."""
    epsilon = noise(derive_seed("likeness", f"{level:g}"), tuple(x0.shape[1:]))
    predicted = model.transformer(
        hidden_states=(1 - level) * x0 + level * epsilon,
        timestep=torch.full((len(x0),), level * TIMESTEPS),
        encoder_hidden_states=torch.cat([tokens for tokens, _ in texts]),
        pooled_projections=torch.cat([pooled for _, pooled in texts]),
        return_dict=False,
    )[0]
    return (predicted - (epsilon - x0)).square().mean((1, 2, 3))


def _encoded(model: _Model, text: str) -> tuple[Tensor, Tensor]:
    """Tokens [1, 12, D] and pooled [1, P] of a text, cut off at 12 tokens."""
    hidden, pooled = [], []
    for tokenizer, encoder in model.texts:
        length = tokenizer.model_max_length
        ids = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        said = encoder(ids, output_hidden_states=True)
        hidden.append(said.hidden_states[-2])
        pooled.append(said.text_embeds)
    tokens = torch.cat(hidden, dim=-1)
    width = model.transformer.config.joint_attention_dim
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[-1])), torch.cat(pooled, dim=-1)
