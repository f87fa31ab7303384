"""Equations that several methods of the comparison share. Shapes: [B, ...] per sample in, [B] out unless said."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dgpo_core.method.loss import denoising_error


def adaptive_error(x: Tensor, target: Tensor, x0: Tensor) -> Tensor:
    """mean (x - target)^2 / sg(mean |x - x0|): about as large at every noise level (DiffusionNFT, section 3.3)."""
    return denoising_error(x, target) / (x - x0).abs().flatten(1).mean(1).detach().clamp_min(1e-5)


def clipped_loss(A: Tensor, log_ratio: Tensor, clip: float) -> Tensor:
    """-min(rho A, clip(rho, 1 - clip, 1 + clip) A), rho = exp(log_ratio): PPO's (arXiv 1707.06347). [B], [B] -> [B]"""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)


def stratified(levels: Tensor, n: int, seed: int) -> list[float]:
    """One level of each of n equal parts of `levels` [m], m >= n: none of the n lies near another by chance."""
    generator = torch.Generator().manual_seed(seed)
    parts: Sequence[Tensor] = levels.tensor_split(n)
    return [float(part[torch.randint(len(part), (), generator=generator)]) for part in parts]
