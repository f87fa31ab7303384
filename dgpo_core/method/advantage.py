"""From rewards to advantages (DGPO, arXiv 2510.08425, section 3; group statistics as in GRPO).

`r` is always [P, G]: P groups (prompts) of G samples. The advantages of a group sum to zero before clamping; this is
what makes the intractable partition function of the preference model cancel.
"""

import torch
from torch import Tensor

STD_FLOOR = 1e-4  # keeps a group of nearly equal rewards from dividing by zero (official code)


def group_advantage(r: Tensor) -> Tensor:
    """A_i = (r_i - mean_g) / (std_g + 1e-4), with the population standard deviation of the group. [P, G] -> [P, G]"""
    return centred(r) / (r.std(dim=1, keepdim=True, correction=0) + STD_FLOOR)


def global_advantage(r: Tensor, everyone: Tensor | None = None) -> Tensor:
    """A_i = (r_i - mean_g) / (std + 1e-4), with the standard deviation of all samples of the iteration.

    `everyone`: the rewards of all processes, any shape, where they are more than `r`.
    """
    return centred(r) / ((r if everyone is None else everyone).std(correction=0) + STD_FLOOR)


def centred(r: Tensor) -> Tensor:
    """r_i - mean_g, [P, G] -> [P, G]; exactly zero where a group's rewards are equal.

    The mean of equal numbers is rounded. Of rewards around 100 the difference, divided by the floor of a deviation of
    zero, would be an advantage of 0.1 for all of the group.
    """
    return torch.where(informative(r).unsqueeze(1), r - r.mean(dim=1, keepdim=True), torch.zeros_like(r))


def clamp(advantage: Tensor, limit: float) -> Tensor:
    """Advantages limited to [-limit, limit] (5 in the paper's configs)."""
    return advantage.clamp(-limit, limit)


def informative(r: Tensor) -> Tensor:
    """Which groups say anything: bool [P], False where all rewards of a group are equal."""
    return (r != r[:, :1]).any(dim=1)


def gated(r: Tensor, passed: Tensor, weight: float) -> Tensor:
    """A reward under a condition: r where `passed`, else the group's worst: no failing sample beats a passing one.

    The worst is the lowest of the group's r, or for a negative weight the highest. Where all of a group fail they are
    equal, and the group learns nothing from this reward. r and passed [..., G] -> [..., G].
    """
    worst = r.amin(dim=-1, keepdim=True) if weight >= 0 else r.amax(dim=-1, keepdim=True)
    return torch.where(passed, r, worst)


def weighted_sum(terms: list[tuple[float, Tensor]]) -> Tensor:
    """sum_k w_k r_k over (weight, values) pairs of equal shape."""
    return torch.stack([weight * values for weight, values in terms]).sum(0)
