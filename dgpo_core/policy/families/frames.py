"""Pictures in the latents of a VAE of films: each is a film of one frame."""

from __future__ import annotations

from torch import Tensor

from dgpo_core.policy.vae import Latents


class OfFrames(Latents):
    """Of a VAE of films, which takes a picture for one frame."""

    @property
    def channels(self) -> int:
        channels: int = self.vae.config.z_dim
        return channels

    @property
    def factor(self) -> int:
        return 2 ** len(self.vae.config.temperal_downsample)

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z.unsqueeze(2)).squeeze(2)

    def encode(self, image: Tensor) -> Tensor:
        return super().encode(image.unsqueeze(2)).squeeze(2)
