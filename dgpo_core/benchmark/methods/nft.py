"""DiffusionNFT (arXiv 2509.16117): flow matching on good samples towards, and on bad ones away from the old policy.

Equations 5 and 6 and algorithm 1; numbers from the authors' configuration for GenEval (github.com/NVlabs/DiffusionNFT:
beta 1, KL 1e-4, advantages by the standard deviation of all samples, clamped to 5). Timesteps are DGPO's.
"""

from collections.abc import Sequence

from torch import Tensor

from dgpo_core.benchmark.methods.equations import adaptive_error
from dgpo_core.benchmark.methods.rival import Rival, drawn_by_old
from dgpo_core.common.group import Group
from dgpo_core.method.advantage import global_advantage
from dgpo_core.method.loss import denoising_error
from dgpo_core.settings.config import Config

BETA, KL, MOST = 1.0, 1e-4, 5.0


def optimality(A: Tensor) -> Tensor:
    """r = 1/2 + clip(A, -5, 5) / 10, the probability that a sample is a good one. Any shape."""
    return 0.5 + A.clamp(-MOST, MOST) / (2 * MOST)


def implicit(v: Tensor, v_old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """v+ = (1 - beta) v_old + beta v, v- = (1 + beta) v_old - beta v: what v says of the good and of the bad."""
    return (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v


def contrast(r: Tensor, good: Tensor, bad: Tensor, beta: float) -> Tensor:
    """5 (r |v+ - v*|^2 + (1 - r) |v- - v*|^2) / beta from the two errors. All [B]."""
    return MOST * (r * good + (1 - r) * bad) / beta


class DiffusionNFT(Rival):
    """Draws with the old policy, whose average slows down to 0.5."""

    what, lr = "DiffusionNFT", 2e-3

    @classmethod
    def settings(cls, config: Config) -> Config:
        return drawn_by_old(config)

    def learn(self, groups: Sequence[Group], r: Tensor) -> None:
        good = optimality(global_advantage(r)).flatten()
        x0, cond = self.together(groups)
        times, x0_from = self.times(), self.policy.prediction.x0_from
        for m, t in enumerate(times):
            at = self.noised(x0, cond, t, m)
            v_old, v_base, v = self.fixed("old", at), self.fixed(None, at), self.predict(at)
            plus, minus = (adaptive_error(x0_from(at.x_t, side, at.t), x0, x0) for side in implicit(v, v_old, BETA))
            loss = contrast(good, plus, minus, BETA) + KL * denoising_error(v, v_base)
            (loss.mean() / len(times)).backward()
        self.take_step()
