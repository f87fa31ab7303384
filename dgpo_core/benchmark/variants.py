"""What was tried to make DGPO learn from less: settings, and changes that no setting offers, each by a short name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from dgpo_core.benchmark.methods import Entrant
from dgpo_core.benchmark.methods.dgpo import DGPO
from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.seeds import derive_seed
from dgpo_core.common.suggest import suggest
from dgpo_core.method import advantage as adv
from dgpo_core.method.ema import ema_
from dgpo_core.method.rollout import rollout
from dgpo_core.method.step import Step
from dgpo_core.rewards import score_groups
from dgpo_core.settings.config import Config
from dgpo_core.settings.values import from_dict


@dataclass(frozen=True)
class Variant:
    """What it is in words; its settings, laid over the quickstart's; and what runs them."""

    what: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    entrant: Entrant = DGPO


def variant(name: str) -> Variant:
    """One of `VARIANTS`, or several joined by "+", of which one may be more than settings. UserError for others."""
    parts = name.split("+")
    for part in parts:
        if part not in VARIANTS:
            raise UserError(f"There is no variant {part!r}{suggest(part, VARIANTS)}")
    found = [VARIANTS[part] for part in parts]
    changed = {one.entrant for one in found} - {DGPO}
    if len(changed) > 1:
        raise UserError(f"Of {name} only one may be more than settings.")
    settings: Mapping[str, Any] = {}
    for one in found:
        settings = _merged(settings, one.settings)
    return Variant(", ".join(one.what for one in found), settings, changed.pop() if changed else DGPO)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        merged[key] = {**merged.get(key, {}), **value}
    return merged


def laid_over(chosen: Variant, preset: Config, seed: int) -> Config:
    """The settings that a variant runs with."""
    return from_dict(chosen.settings, replace(preset, seed=seed), chosen.what)


# --- more than settings ----------------------------------------------------------------------------------------------


class Scored(DGPO):
    """DGPO whose iteration is written out: draw, score, learn."""

    iterations = 0

    def draw(self) -> list[Group]:
        """The scored groups of the next prompts."""
        step = self.trainer.step
        mine = list(enumerate(self.trainer.stream.at(self.iterations)))
        self.iterations += 1
        return score_groups(step.draw(mine), self.trainer.rewards)

    def iterate(self) -> None:
        groups = self.draw()
        self.trainer.step.learn(groups, range(len(groups)))


class TwoHalves(Scored):
    """Two optimiser steps a roll-out: each half of the groups is one, the second a step behind its policy."""

    def iterate(self) -> None:
        groups = self.draw()
        half = len(groups) // 2
        for part in (range(half), range(half, len(groups))):
            self.trainer.step.learn([groups[i] for i in part], list(part))


class TwoEpochs(Scored):
    """Two optimiser steps a roll-out, both on all groups at timesteps and noise of their own; the second is clipped
    against the policy that drew them, where `training.clip` is above 0."""

    def iterate(self) -> None:
        step = self.trainer.step
        groups = self.draw()
        drew = {key: value.clone() for key, value in step.policy.adapter_state("current").items()}
        step.learn(groups, range(len(groups)))
        ema_(step.policy.adapter_state("old"), drew, 0.0)
        step.old_is_current = False
        step.learn(groups, range(len(groups)))


class Ranked(DGPO):
    """Advantages of the ranks within a group; ties share their mean."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        step = self.trainer.step
        self.trainer.step = RankedStep(step.policy, step.settings, size=step.size)


class RankedStep(Step):
    """A step whose advantages are those of ranks."""

    def _advantages(self, groups: Sequence[Group]) -> tuple[list[Tensor], list[Tensor]]:
        r, _ = super()._advantages(groups)
        return r, [adv.group_advantage(ranks(row)[None])[0] for row in r]


def ranks(r: Tensor) -> Tensor:
    """How many samples are worse, and half of those that are equal. [G] -> [G]"""
    below = (r[None, :] < r[:, None]).float().sum(dim=1)
    return below + ((r[None, :] == r[:, None]).float().sum(dim=1) - 1) / 2


class Scheduled(DGPO):
    """The learning rate follows a schedule of the iteration."""

    schedule: Callable[[int], float]

    def iterate(self) -> None:
        step = self.trainer.step
        for group in step.optimizer.param_groups:
            group["lr"] = step.settings.training.lr * self.schedule(step.iteration)
        super().iterate()


class WarmUp(Scheduled):
    """Linearly up over the first 10 steps."""

    @staticmethod
    def schedule(k: int) -> float:
        return min(1.0, (k + 1) / 10)


class Decay(Scheduled):
    """Down as 1 / (1 + k / 20)."""

    @staticmethod
    def schedule(k: int) -> float:
        return 1 / (1 + k / 20)


class Muon(DGPO):
    """Muon (Keller Jordan, 2024) instead of AdamW, its update as large as AdamW's (arXiv 2502.16982)."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        step = self.trainer.step
        t = step.settings.training
        muon = torch.optim.Muon(
            step.parameters.values(), lr=t.lr, weight_decay=t.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        step.optimizer = cast(torch.optim.AdamW, muon)  # nothing but its steps is asked of it here


class Explore(Scored):
    """Draw three times as many candidates in 3 steps, score them, and draw the seeds of the best and worst anew."""

    candidates, steps = 3, 3

    def draw(self) -> list[Group]:
        step, k = self.trainer.step, self.iterations
        prompts = self.trainer.stream.at(k)
        self.iterations += 1
        size = step.settings.rollout.group_size
        many = [
            [derive_seed(self.trainer.config.seed, "explore", k, g, i) for i in range(size * self.candidates)]
            for g in range(len(prompts))
        ]
        cheap = score_groups(self._drawn(self.steps, prompts, many), self.trainer.rewards)
        kept = [
            [seeds[i] for i in extremes(group.scores["shapes_graded"], size)]
            for group, seeds in zip(cheap, many, strict=True)
        ]
        return score_groups(self._drawn(step.settings.rollout.steps, prompts, kept), self.trainer.rewards)

    def _drawn(self, steps: int, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> list[Group]:
        step = self.trainer.step
        r = step.settings.rollout
        solver = step.policy.solver(r.solver, steps, *step.size)
        with step.policy.using("current"):
            return rollout(step.policy, solver, prompts, seeds, size=step.size, cfg=r.cfg, batch=r.at_once)


def extremes(r: Tensor, size: int) -> list[int]:
    """The places of the size / 2 best and the size / 2 worst of r [N], equal ones in their order."""
    order = r.argsort(stable=True).tolist()
    return sorted([*order[: size // 2], *order[len(order) - (size - size // 2) :]])


# --- the table -------------------------------------------------------------------------------------------------------


def _training(what: str, entrant: Entrant = DGPO, **values: Any) -> Variant:
    return Variant(what, {"training": values}, entrant)


def _rollout(what: str, **values: Any) -> Variant:
    return Variant(what, {"rollout": values})


VARIANTS: Mapping[str, Variant] = {
    "quickstart": Variant("the quickstart"),
    "lr_2e-3": _training("lr 2e-3", lr=2e-3),
    "lr_3e-3": _training("lr 3e-3", lr=3e-3),
    "lr_4e-3": _training("lr 4e-3", lr=4e-3),
    "groups_of_4": _rollout("groups of 4", group_size=4),
    "groups_of_8": _rollout("groups of 8", group_size=8),
    "groups_of_32": _rollout("groups of 32", group_size=32),
    "prompts_4": Variant("4 prompts", {"data": {"groups_per_iteration": 4}}),
    "prompts_16": Variant("16 prompts", {"data": {"groups_per_iteration": 16}}),
    "timesteps_1": _training("1 timestep", timesteps=1),
    "timesteps_2": _training("2 timesteps", timesteps=2),
    "timesteps_7": _training("7 timesteps", timesteps=7),
    "steps_4": Variant("4 steps", {"rollout": {"steps": 4}, "training": {"t_min": 4}}),
    "steps_5": Variant("5 steps", {"rollout": {"steps": 5}, "training": {"t_min": 5}}),
    "steps_6": Variant("6 steps", {"rollout": {"steps": 6}, "training": {"t_min": 6}}),
    "dpmpp_2m": Variant("dpmpp_2m", {"rollout": {"solver": "dpmpp_2m"}, "evaluation": {"solver": "euler"}}),
    "no_kl": _training("no KL", kl_weight=0.0),
    "no_reference": _training("no reference, no KL", kl_weight=0.0, reference="old", ema_fast_max=0.0),
    "moving_reference": _training("moving reference", reference="old", beta=2000.0),
    "global_std": _training("deviation of all", advantage_std="global"),
    "clip_5e-3": _training("gradient norm 0.005", max_grad_norm=5e-3),
    "two_halves": _training("two steps, half the groups each", TwoHalves),
    "two_epochs": _training("two steps on all", TwoEpochs),
    "two_epochs_clip": _training("two steps on all, clip 0.01", TwoEpochs, clip=0.01),
    "ranked": _training("ranks", Ranked),
    "warm_up": _training("warm-up over 10 steps", WarmUp),
    "decay": _training("decay 1 / (1 + k / 20)", Decay),
    "muon": _training("Muon", Muon),
    "pass_over": Variant("what taught nothing passed over 3 times", {"data": {"pass_over": 3}}),
    "explore": Variant("best and worst of 48 in 3 steps", {}, Explore),
    "int8": Variant("the base in int8", {"model": {"quantize": "int8"}}),
    "fp8": Variant("the base in fp8", {"model": {"quantize": "fp8"}}),
    "nf4": Variant("the base in nf4", {"model": {"quantize": "nf4"}}),
}
"""By name; each is the quickstart but for what it says."""
