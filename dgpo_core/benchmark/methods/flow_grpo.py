"""Flow-GRPO (arXiv 2505.05470) and its Fast variant: GRPO on the steps of a roll-out by an SDE.

Numbers from the authors' configurations (github.com/yifan123/flow_grpo). Flow-GRPO: noise 0.7 at all steps but the
last, which is not trained, clip 1e-4, KL 0.04, as for GenEval. Fast: noise 0.8 at two neighbouring steps in the first
half of the roll-out, clip 1e-5, no KL. Both take two steps an iteration, each on half of the samples that count.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dgpo_core.benchmark.methods.equations import clipped_loss
from dgpo_core.benchmark.methods.rival import Rival
from dgpo_core.benchmark.methods.sde import Move, kl, log_prob, sde_step, walk
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.seeds import noise
from dgpo_core.method.advantage import clamp, global_advantage, informative
from dgpo_core.policy.base import Cond

MOST = 5.0


class FlowGRPO(Rival):
    """noise_level, clip and kl_weight are the paper's a, epsilon and beta."""

    what, lr = "Flow-GRPO", 2e-3
    noise_level: ClassVar[float] = 0.7
    clip: ClassVar[float] = 1e-4
    kl_weight: ClassVar[float] = 0.04

    def window(self, steps: int) -> range:
        """The steps that are the SDE's."""
        return range(steps - 1)

    def draw(self, prompts: Sequence[Prompt]) -> list[Group]:
        G, shape = self.config.rollout.group_size, self.policy.latent_shape(*self.step.size)
        seeds = [self.seed("rollout", i) for i in range(len(prompts) * G)]
        levels = [*self.policy.prediction.level(self.step.solver.timesteps).tolist(), 0.0]
        conds, _ = self.step.condition(prompts)
        self.cond = Cond.cat([cond.expand(G) for cond in conds])
        x_T = torch.stack([noise(seed, shape) for seed in seeds])
        window = self.window(len(levels) - 1)
        x0, self.moves = walk(self.policy, self.cond, x_T, levels, window, self.noise_level, self.seed("sde"))
        images = self.policy.decode(x0).cpu()
        rows = [slice(g * G, (g + 1) * G) for g in range(len(prompts))]
        return [Group(p, tuple(seeds[c]), x0[c], images[c]) for p, c in zip(prompts, rows, strict=True)]

    def learn(self, groups: Sequence[Group], r: Tensor) -> None:
        useful = informative(r).repeat_interleave(r.shape[1]).nonzero().flatten()
        A = clamp(global_advantage(r), MOST).flatten()
        for rows in useful.tensor_split(2):
            for move in self.moves if len(rows) else ():
                (self.loss(move, rows, A[rows]).mean() / len(self.moves)).backward()
            self.take_step()

    def loss(self, move: Move, rows: Tensor, A: Tensor) -> Tensor:
        """Of some of the samples at one step. [B], [B] -> [B]"""
        x, cond = move.x[rows], self.cond.select(rows)
        t = torch.full((len(rows),), move.s * self.policy.prediction.num_train_timesteps)
        mean, std = sde_step(x, self.policy.predict(x, t, cond), move.s, move.s_next, move.sigma)
        loss = clipped_loss(A, log_prob(move.x_next[rows], mean, std) - move.log_p[rows], self.clip)
        if not self.kl_weight:
            return loss
        with torch.no_grad(), self.policy.using(None):
            base, _ = sde_step(x, self.policy.predict(x, t, cond), move.s, move.s_next, move.sigma)
        return loss + self.kl_weight * kl(mean, base, std)


class FlowGRPOFast(FlowGRPO):
    """Where the two steps begin is drawn in each iteration."""

    what, lr = "Flow-GRPO-Fast", 2e-3
    noise_level, clip, kl_weight = 0.8, 1e-5, 0.0

    def window(self, steps: int) -> range:
        first = self.seed("window") % (steps // 2 - 1)
        return range(first, first + 2)
