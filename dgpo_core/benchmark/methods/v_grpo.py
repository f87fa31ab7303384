"""V-GRPO (arXiv 2604.23380): GRPO with the pre-training loss of the whole sample for its log-likelihood.

From public descriptions of the paper; its code could not be had. Timesteps in strata and noise are shared by the group;
the loss is that of x0, adaptively weighted; two steps an iteration under a clip of 0.01, without KL.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dgpo_core.benchmark.methods.equations import adaptive_error, clipped_loss, stratified
from dgpo_core.benchmark.methods.rival import Noised, Rival
from dgpo_core.common.group import Group
from dgpo_core.method.advantage import group_advantage, informative

CLIP = 1e-2


def surrogate(errors: Sequence[Tensor]) -> Tensor:
    """-mean_j of the adaptive errors at the timesteps t_j, for log p of a sample. n times [B] -> [B]"""
    return -torch.stack(list(errors)).mean(dim=0)


class VGRPO(Rival):
    """Each half of the groups that prefer anything is one step; the second half's old policy is that before both."""

    what, lr = "V-GRPO", 1e-3

    def times(self) -> list[float]:
        return stratified(self.step.candidates, self.config.training.timesteps, self.seed("timesteps"))

    def learn(self, groups: Sequence[Group], r: Tensor) -> None:
        useful, A = informative(r).nonzero().flatten(), group_advantage(r)
        halves = [half for half in useful.tensor_split(2) if len(half)]
        noised = [self.at([groups[i] for i in half]) for half in halves]
        with torch.no_grad():
            old = [self.log_p(half) for half in noised[1:]]
        for i, (half, at) in enumerate(zip(halves, noised, strict=True)):
            log_p = self.log_p(at)
            before = log_p.detach() if i == 0 else old[i - 1]  # nothing has moved before the first step
            clipped_loss(A[half].flatten(), log_p - before, CLIP).mean().backward()
            self.take_step()

    def at(self, groups: Sequence[Group]) -> list[Noised]:
        """The groups at every timestep."""
        (x0, cond), G = self.together(groups), len(groups[0])
        return [self.noised(x0, cond, t, m, shared_by=G) for m, t in enumerate(self.times())]

    def log_p(self, noised: Sequence[Noised]) -> Tensor:
        """The current policy's surrogate."""
        x0 = [self.policy.prediction.x0_from(at.x_t, self.predict(at), at.t) for at in noised]
        return surrogate([adaptive_error(x, at.x0, at.x0) for x, at in zip(x0, noised, strict=True)])
