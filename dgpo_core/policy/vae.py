"""From latents to pictures and back by a diffusers VAE, a bounded number at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Images decoded or encoded at once hold at most this many pixels (8 of 512 x 512): the VAE's peak memory is bounded.
_VAE_PIXELS = 8 * 512 * 512


@torch.no_grad()
def decoded(vae: Any, latents: Tensor, factor: int) -> Tensor:
    """Latents [B,C,h,w] -> images [B,3,H,W], float32, 0..1; factor: pixels of a latent's side."""
    scale, shift = _latent_scale(vae, latents.device)

    def chunk(z: Tensor) -> Tensor:
        image = vae.decode((z / scale + shift).to(vae.dtype), return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp_(0, 1)

    return _in_chunks(chunk, latents, latents.shape[-2] * latents.shape[-1] * factor**2)


@torch.no_grad()
def encoded(vae: Any, images: Tensor) -> Tensor:
    """Images [B,3,H,W] in 0..1 -> latents [B,C,h,w], float32: the mode of the VAE's posterior, scaled."""
    scale, shift = _latent_scale(vae, images.device)

    def chunk(image: Tensor) -> Tensor:
        z = vae.encode((image * 2 - 1).to(vae.dtype)).latent_dist.mode().float()
        return (z - shift) * scale

    return _in_chunks(chunk, images, images.shape[-2] * images.shape[-1])


def _latent_scale(vae: Any, device: torch.device) -> tuple[Tensor | float, Tensor | float]:
    """(scale, shift): latent = (z - shift) * scale; per channel where the VAE says so (some SDXL VAEs do)."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
    mean, std = (torch.tensor(v, device=device, dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std))
    return config.scaling_factor / std, mean


def _in_chunks(f: Callable[[Tensor], Tensor], batch: Tensor, pixels: int) -> Tensor:
    """f over the batch, a bounded number of images at once."""
    rows = max(1, _VAE_PIXELS // pixels)
    if len(batch) <= rows:
        return f(batch)
    return torch.cat([f(part) for part in batch.split(rows)])
