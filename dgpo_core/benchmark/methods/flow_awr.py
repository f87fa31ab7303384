"""FlowAWR (arXiv 2606.30376): regression to the old policy's velocity, corrected by each sample's advantage.

From the authors' code and configuration (github.com/Fuzm7/FlowAWR): energies of a softmax within the group, "hard
gating" as they have it for rewards by rule, KL 1e-4; draws with the old policy, whose average slows down to 0.5.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dgpo_core.benchmark.methods.equations import adaptive_error
from dgpo_core.benchmark.methods.rival import Rival, drawn_by_old
from dgpo_core.common.group import Group
from dgpo_core.method.advantage import global_advantage
from dgpo_core.method.loss import denoising_error
from dgpo_core.settings.config import Config

KL, MOST, LEAST_STD = 1e-4, 3.0, 1e-2


def energy(A: Tensor) -> Tensor:
    """(softmax(A) - 1/G) / max(std + 1e-4, 0.01), clamped to 3: above 0 for better than the group. [P, G] -> [P, G]"""
    e = torch.softmax(A, dim=1) - 1 / A.shape[1]
    std = e.std(dim=1, keepdim=True, correction=0) + 1e-4
    return (e / std.clamp_min(LEAST_STD)).clamp(-MOST, MOST)


def rectified(x0_old: Tensor, x0: Tensor, e: Tensor) -> Tensor:
    """x0_old + e (x0 - x0_old): where the prediction should be, beyond the sample or away from it. [B, ...], [B]"""
    return x0_old + e.view(-1, *[1] * (x0.ndim - 1)) * (x0 - x0_old)


class FlowAWR(Rival):
    """One step an iteration."""

    what, lr = "FlowAWR", 2e-3

    @classmethod
    def settings(cls, config: Config) -> Config:
        return drawn_by_old(config)

    def learn(self, groups: Sequence[Group], r: Tensor) -> None:
        e = energy(global_advantage(r)).flatten()
        x0, cond = self.together(groups)
        times, x0_from = self.times(), self.policy.prediction.x0_from
        for m, t in enumerate(times):
            at = self.noised(x0, cond, t, m)
            v_old, v_base, v = self.fixed("old", at), self.fixed(None, at), self.predict(at)
            target = rectified(x0_from(at.x_t, v_old, at.t), x0, e)
            loss = adaptive_error(x0_from(at.x_t, v, at.t), target, x0) + KL * denoising_error(v, v_base)
            (loss.mean() / len(times)).backward()
        self.take_step()
