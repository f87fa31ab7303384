"""Advantage Weighted Matching (arXiv 2509.25050): policy gradients with the flow-matching loss for a log-likelihood.

Numbers from the authors' configuration for GenEval without CFG (github.com/scxue/advantage_weighted_matching): weight
"ghuber" with power 1/4, advantages by the standard deviation of all samples, clamped to 5 and divided by it, KL 0.003
to the base and 1 to the average of the adapter. On policy the ratio is 1, and only its gradient counts.
"""

from collections.abc import Sequence

from torch import Tensor

from dgpo_core.benchmark.methods.equations import clipped_loss, stratified
from dgpo_core.benchmark.methods.rival import Rival
from dgpo_core.common.group import Group
from dgpo_core.method.advantage import clamp, global_advantage
from dgpo_core.method.loss import denoising_error

POWER, SMALL, KL, KL_OLD, CLIP, MOST = 0.25, 1e-10, 0.003, 1.0, 1.0, 5.0


def log_likelihood(d: Tensor, level: Tensor) -> Tensor:
    """-level (d^p - 1e-10^p) / p with p = 1/4, from the denoising errors d and the noise levels 0..1. All [B]."""
    return -level * ((d + SMALL) ** POWER - SMALL**POWER) / POWER


class AWM(Rival):
    """The old policy that KL holds it to is DGPO's fast average: their decays are the same."""

    what, lr = "AWM", 2e-3

    def times(self) -> list[float]:
        return stratified(self.step.candidates, self.config.training.timesteps, self.seed("timesteps"))

    def learn(self, groups: Sequence[Group], r: Tensor) -> None:
        A = clamp(global_advantage(r), MOST).flatten() / MOST
        x0, cond = self.together(groups)
        times = self.times()
        for m, t in enumerate(times):
            at = self.noised(x0, cond, t, m)
            v_old, v_base, v = self.fixed("old", at), self.fixed(None, at), self.predict(at)
            log_p = log_likelihood(denoising_error(v, at.target), self.policy.prediction.level(at.t))
            loss = clipped_loss(A, log_p - log_p.detach(), CLIP)
            loss = loss + KL * denoising_error(v, v_base) + KL_OLD * denoising_error(v, v_old)
            (loss.mean() / len(times)).backward()
        self.take_step()
