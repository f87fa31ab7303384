"""The DGPO objective (arXiv 2510.08425), one function per equation.

Symbols: d_i is a sample's denoising error under the current policy, d_ref and d_old the same under the reference and
the old policy; A_i its advantage; s_g the group's logit; beta the sharpness of the preference. Shapes: [P, G] per
sample, [P] per group.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Scaling = Literal["official", "paper"]


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """d_i = mean over elements of (target - f)^2. [B, ...] -> [B]

    Also the KL term's distance, with the reference's prediction as the target.
    """
    return (prediction - target).square().flatten(1).mean(1)


def group_logit(A: Tensor, d: Tensor, d_ref: Tensor, beta: float) -> Tensor:
    """s_g = (beta / G) sum_i A_i (d_i - d_ref,i). [P, G] -> [P]"""
    return beta * (A * (d - d_ref)).mean(dim=1)


def group_loss(s: Tensor) -> Tensor:
    """L_g = -log sigmoid(-s_g): small where the preferred samples fit better than under the reference. [P] -> [P]"""
    return -F.logsigmoid(-s)


def gradient_weight(s: Tensor, A: Tensor, beta: float, scaling: Scaling) -> Tensor:
    """G dL_g / dd_i, what each sample's error is multiplied with in the surrogate. [P], [P, G] -> [P, G]

    "paper": sigmoid(s_g) beta A_i, the exact gradient of `group_loss`. "official": without the factor beta, as the
    authors' code has it; it then does not grow against the KL term and the gradient clip.
    """
    weight = torch.sigmoid(s).unsqueeze(1) * A
    return (weight * beta if scaling == "paper" else weight).detach()


def surrogate(weight: Tensor, d: Tensor) -> Tensor:
    """mean_i weight_i d_i: with `gradient_weight`, its gradient is that of the mean `group_loss`. -> scalar"""
    return (weight * d).mean()


def norm_ratio(f: Tensor, f_base: Tensor) -> Tensor:
    """|f| / |f_base| of each sample: how much larger than the base's a prediction has become. [B, ...] -> [B]"""
    return f.flatten(1).norm(dim=1) / f_base.flatten(1).norm(dim=1).clamp_min(1e-6)


def growth(ratio: Tensor) -> Tensor:
    """max(0, |f| / |f_base| - 1): the hinge of `norm_guard`, which leaves a smaller norm alone. [B] -> [B]

    The idea is NormGuard's (arXiv 2606.27771), the form our own.
    """
    return (ratio - 1).clamp_min(0)


def unclipped(A: Tensor, d: Tensor, d_old: Tensor, clip: float) -> Tensor:
    """PPO-style clip: False where the sample has already moved far enough from the old policy. -> bool, shape of d

    ratio_i = exp(d_old,i - d_i); stopped where A_i > 0 and ratio > 1 + clip, or A_i <= 0 and ratio < 1 - clip.
    """
    ratio = torch.exp(d_old - d)
    stopped = torch.where(A > 0, ratio > 1 + clip, ratio < 1 - clip)
    return ~stopped
