"""From latents to pictures and back by a diffusers VAE, a bounded number at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Images decoded or encoded at once hold at most this many pixels: the VAE's peak memory is bounded. More would be no
# faster: one image of 1024 x 1024 keeps a card busy, and takes 2 GiB.
_VAE_PIXELS = 1024 * 1024


class Latents:
    """Latents as a network draws them, and the VAE whose they are. A family with another kind has a class on this."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @property
    def channels(self) -> int:
        """Of a latent."""
        channels: int = self.vae.config.latent_channels
        return channels

    @property
    def factor(self) -> int:
        """Pixels of the side of a latent's place."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Latents [B,C,h,w] -> images [B,3,H,W], float32, 0..1."""
        scale, shift = self.scale(latents.device)

        def chunk(z: Tensor) -> Tensor:
            image = self.decode((z / scale + shift).to(self.vae.dtype))
            return (image.float() / 2 + 0.5).clamp_(0, 1)

        return _in_chunks(chunk, latents, (latents.shape[-2] * self.factor, latents.shape[-1] * self.factor))

    @torch.no_grad()
    def encoded(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] in 0..1 -> latents [B,C,h,w], float32: the mode of the VAE's posterior, scaled."""
        scale, shift = self.scale(images.device)

        def chunk(image: Tensor) -> Tensor:
            return (self.encode((image * 2 - 1).to(self.vae.dtype)).float() - shift) * scale

        return _in_chunks(chunk, images, (images.shape[-2], images.shape[-1]))

    def scale(self, device: torch.device) -> tuple[Tensor | float, Tensor | float]:
        """(scale, shift): latent = (z - shift) * scale; per channel where the VAE says so (some SDXL VAEs do)."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
        mean, std = (torch.tensor(v, device=device, dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std))
        return getattr(config, "scaling_factor", 1.0) / std, mean

    def decode(self, z: Tensor) -> Tensor:
        """Images in -1..1 of the VAE's own z, in its dtype."""
        image: Tensor = self.vae.decode(z, return_dict=False)[0]
        return image

    def encode(self, image: Tensor) -> Tensor:
        """The VAE's own z of images in -1..1, without noise."""
        z: Tensor = self.vae.encode(image).latent_dist.mode()
        return z


def images_at_once(size: tuple[int, int]) -> int:
    """How many images of (height, width) pixels are worked on together, at most."""
    return max(1, _VAE_PIXELS // (size[0] * size[1]))


def _in_chunks(f: Callable[[Tensor], Tensor], batch: Tensor, size: tuple[int, int]) -> Tensor:
    """f over the batch, a bounded number of images of this size in pixels at once."""
    rows = images_at_once(size)
    if len(batch) <= rows:
        return f(batch)
    return torch.cat([f(part) for part in batch.split(rows)])
