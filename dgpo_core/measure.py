"""How good is an adapter? Images of held-out prompts, from seeds that training never uses, under a reward."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgpo_core.config import Config
from dgpo_core.distributed import World
from dgpo_core.group import Group
from dgpo_core.policy.base import AdapterName, Policy
from dgpo_core.prompts import Prompt
from dgpo_core.rewards import Reward, score_groups
from dgpo_core.rollout import Check, nothing, rollout
from dgpo_core.seeds import derive_seed
from dgpo_core.solvers import Solver


@dataclass(frozen=True)
class Measurement:
    """The mean reward over n images, with its 95 % confidence interval."""

    mean: float
    ci95: tuple[float, float]
    n: int

    @staticmethod
    def of(scores: Tensor) -> "Measurement":
        """From [n] scores of independently drawn images; normal approximation."""
        n, mean = len(scores), scores.mean().item()
        half = 1.96 * scores.std().item() / math.sqrt(n) if n > 1 else 0.0
        return Measurement(mean, (mean - half, mean + half), n)

    def as_json(self) -> dict[str, object]:
        """As summary.json holds it."""
        return {"mean": self.mean, "ci95": list(self.ci95), "n": self.n}

    def __str__(self) -> str:
        return f"{self.mean:.3f}  (95 % interval {self.ci95[0]:.3f} to {self.ci95[1]:.3f}, {self.n} images)"


def evaluation_set(prompts: Sequence[Prompt], images: int) -> list[tuple[Prompt, list[int]]]:
    """Prompts with the seeds of their images: `images` in all, spread evenly, the same for every adapter."""
    each, more = divmod(images, len(prompts))
    rows = []
    for i, prompt in enumerate(prompts):
        copies = each + (i < more)
        if copies:
            rows.append((prompt, [derive_seed("evaluation", i, copy) for copy in range(copies)]))
    return rows


def evaluation_solver(policy: Policy, config: Config, size: tuple[int, int]) -> Solver:
    """The evaluation's solver; where it is the roll-out's, on the noise levels of the roll-out's scheduler."""
    e, drawn = config.evaluation, config.rollout
    name = e.solver or drawn.solver
    return policy.solver(name, e.steps, *size, scheduler=drawn.scheduler if name == drawn.solver else "")


def draw_evaluation(
    policy: Policy,
    adapter: AdapterName | None,
    rows: Sequence[tuple[Prompt, list[int]]],
    config: Config,
    size: tuple[int, int],
    check: Check = nothing,
) -> list[Group]:
    """The images of an evaluation set with the evaluation's solver, steps and guidance."""
    e, solver = config.evaluation, evaluation_solver(policy, config, size)
    with policy.using(adapter):
        return rollout(
            policy,
            solver,
            [prompt for prompt, _ in rows],
            [seeds for _, seeds in rows],
            size=size,
            cfg=e.cfg,
            negative_prompt=config.rollout.negative_prompt,
            batch=e.batch,
            check=check,
        )


def total(group: Group, weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of a group's scores, [G]."""
    return torch.stack([weight * group.scores[name] for name, weight in weights.items()]).sum(0)


def evaluation_weights(config: Config) -> dict[str, float]:
    """The weights of the reward that measures the gain."""
    if config.evaluation.reward:
        return {config.evaluation.reward: 1.0}
    return {term.name: term.weight for term in config.reward}


def measure(
    policy: Policy,
    adapter: AdapterName | None,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    config: Config,
    size: tuple[int, int],
    images: int,
    world: World,
    check: Check = nothing,
) -> Measurement:
    """The mean reward of `images` images of held-out prompts; the work is spread over the processes."""
    mine = world.share(evaluation_set(prompts, images))
    groups = draw_evaluation(policy, adapter, mine, config, size, check) if mine else []
    weights = evaluation_weights(config)
    scores = world.gather([total(group, weights) for group in score_groups(groups, rewards)])
    return Measurement.of(torch.cat(scores))
