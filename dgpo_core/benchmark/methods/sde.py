"""Flow-GRPO's roll-out by an SDE (arXiv 2505.05470, equations 8, 9 and 12) with the same marginals as the ODE's.

x_t = (1 - s) x0 + s eps; s falls from 1 to 0, so that dt = s_next - s < 0. a is the noise level.
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dgpo_core.common.seeds import derive_seed, noise
from dgpo_core.policy.base import Cond, Policy


@dataclass(frozen=True, eq=False)
class Move:
    """A step of the SDE by B samples: from x at level s to x_next at s_next, and log_p [B] of those who drew."""

    x: Tensor
    x_next: Tensor
    s: float
    s_next: float
    sigma: float
    log_p: Tensor


def diffusion(s: float, s_second: float, a: float) -> float:
    """sigma_t = a sqrt(s / (1 - s)); at s = 1, where that is infinite, with the second level of the schedule below."""
    return a * math.sqrt(s / (1 - (s if s < 1 else s_second)))


def sde_step(x: Tensor, v: Tensor, s: float, s_next: float, sigma: float) -> tuple[Tensor, float]:
    """Mean and deviation of x at s_next: x + (v + sigma^2 / (2 s) (x + (1 - s) v)) dt, and sigma sqrt(-dt)."""
    dt = s_next - s
    return x + (v + sigma**2 / (2 * s) * (x + (1 - s) * v)) * dt, sigma * math.sqrt(-dt)


def log_prob(x_next: Tensor, mean: Tensor, std: float) -> Tensor:
    """log N(x_next; mean, std^2), as the mean over a sample's elements (the authors' code). [B, ...] -> [B]"""
    log_p = -((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return log_p.flatten(1).mean(1)


def kl(mean: Tensor, mean_base: Tensor, std: float) -> Tensor:
    """KL of two Gaussians of one deviation, (mean - mean_base)^2 / (2 std^2), as a mean, too. [B, ...] -> [B]"""
    return torch.square(mean - mean_base).flatten(1).mean(1) / (2 * std**2)


@torch.no_grad()
def walk(
    policy: Policy, cond: Cond, x: Tensor, levels: Sequence[float], window: Container[int], a: float, seed: int
) -> tuple[Tensor, list[Move]]:
    """From noise x [B, C, h, w] to x0 along `levels` (1 down to 0), by Euler's steps but for those in `window`, which
    are the SDE's and are told."""
    moves = []
    for i, (s, s_next) in enumerate(pairwise(levels)):
        v = policy.predict(x, torch.full((len(x),), s * policy.prediction.num_train_timesteps), cond)
        if i not in window:
            x = x + v * (s_next - s)
            continue
        sigma = diffusion(s, levels[1], a)
        mean, std = sde_step(x, v, s, s_next, sigma)
        x_next = mean + std * noise(derive_seed(seed, i), tuple(x.shape))
        moves.append(Move(x, x_next, s, s_next, sigma, log_prob(x_next, mean, std)))
        x = x_next
    return x, moves
