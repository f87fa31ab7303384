"""What the methods of the comparison have in common with DGPO: prompts, roll-out, reward, optimiser, averages."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt, PromptStream
from dgpo_core.common.seeds import derive_seed, noise
from dgpo_core.evaluation.scores import total
from dgpo_core.method.step import Step, StepSettings
from dgpo_core.method.update import draw_timesteps
from dgpo_core.policy.base import AdapterName, Cond, Policy
from dgpo_core.rewards import Reward, score_groups, weights_of
from dgpo_core.settings.config import Config


@dataclass(frozen=True, eq=False)
class Noised:
    """B samples x0 [B, C, h, w] of one iteration, with noise to the level of t [B]; target is the velocity."""

    x0: Tensor
    x_t: Tensor
    target: Tensor
    t: Tensor
    cond: Cond


def drawn_by_old(config: Config) -> Config:
    """The settings with all roll-outs by the old policy, whose average slows down to 0.5."""
    training = replace(config.training, ema_fast_max=0.5, ema_fast_rate=0.001)
    return replace(config, training=training, rollout=replace(config.rollout, on_policy_steps=0))


class Rival(ABC):
    """One method: `iterate` is its loop, of which `learn` is its own.

    what: its name. lr: what the command takes by itself: quick in the tuning, and not its largest.
    """

    what: ClassVar[str]
    lr: ClassVar[float]

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        rewards: Mapping[str, Reward],
        config: Config,
        size: tuple[int, int],
    ) -> None:
        self.policy, self.rewards = policy, rewards
        self.config = self.settings(config)
        self.step = Step(policy, StepSettings.of(self.config), size=size)
        self.stream = PromptStream(prompts, config.data.groups_per_iteration, config.seed)

    @classmethod
    def settings(cls, config: Config) -> Config:
        """The quickstart's settings with what this method has otherwise."""
        return config

    def iterate(self) -> None:
        """One iteration: draw groups, score them, learn from them, let the averages follow."""
        groups = score_groups(self.draw(self.stream.at(self.step.iteration)), self.rewards)
        weights = weights_of(self.config.reward)
        r = torch.stack([total(group, weights) for group in groups])
        self.learn(groups, r)
        self.step.advance()

    def draw(self, prompts: Sequence[Prompt]) -> list[Group]:
        """A group for each prompt, not scored: by default DGPO's roll-out by an ODE."""
        return self.step.draw(list(enumerate(prompts)))

    @abstractmethod
    def learn(self, groups: Sequence[Group], r: Tensor) -> None:
        """Change the current weights by scored groups; r [P, G]: their rewards."""

    # --- what `learn` is made of -------------------------------------------------------------------------------------

    def seed(self, *parts: int | str) -> int:
        """A seed of this iteration."""
        return derive_seed(self.config.seed, *parts, self.step.iteration)

    def times(self) -> list[float]:
        """The iteration's training timesteps: as many, and of the same, as DGPO's."""
        return draw_timesteps(
            self.step.candidates, self.config.training, self.policy.prediction, self.seed("timesteps")
        )

    def together(self, groups: Sequence[Group]) -> tuple[Tensor, Cond]:
        """All samples and their conditionings, [P G] rows."""
        conds, _ = self.step.condition([group.prompt for group in groups])
        cond = Cond.cat([cond.expand(len(group)) for cond, group in zip(conds, groups, strict=True)])
        return torch.cat([group.latents for group in groups]), cond

    def noised(self, x0: Tensor, cond: Cond, level: float, draw: int, shared_by: int = 1) -> Noised:
        """The samples at one timestep; `shared_by` neighbours have the same noise, that of number `draw`."""
        seeds = [self.seed("noise", draw, i // shared_by) for i in range(len(x0))]
        eps = torch.stack([noise(seed, tuple(x0.shape[1:])) for seed in seeds]).to(x0.device)
        t, prediction = torch.full((len(x0),), level, device=x0.device), self.policy.prediction
        return Noised(x0, prediction.add_noise(x0, eps, t), prediction.target(x0, eps, t), t, cond)

    def predict(self, at: Noised) -> Tensor:
        """The current policy's velocity, with gradient."""
        return self.policy.predict(at.x_t, at.t, at.cond)

    @torch.no_grad()
    def fixed(self, adapter: AdapterName | None, at: Noised) -> Tensor:
        """The velocity of another policy (None: of the base), without gradient."""
        with self.policy.using(adapter):
            return self.policy.predict(at.x_t, at.t, at.cond)

    def take_step(self) -> None:
        """One optimiser step on the gradients that have come together."""
        parameters = self.step.parameters.values()
        torch.nn.utils.clip_grad_norm_(parameters, self.config.training.max_grad_norm)
        self.step.optimizer.step()
        self.step.optimizer.zero_grad()
