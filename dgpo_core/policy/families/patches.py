"""Latents as tokens, one for every 2 x 2 patch."""

from __future__ import annotations

from torch import Tensor


def pack(x: Tensor) -> Tensor:
    """[B,C,h,w] -> [B, h/2 * w/2, 4C]: every 2 x 2 patch is one token, channels outermost."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for a latent of height x width."""
    b, _, c = tokens.shape
    patches = tokens.view(b, height // 2, width // 2, c // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height, width)
