"""Loaded rewards, and what nodes score with them.

The rewards are in `_rewards`, made when ComfyUI imports the nodes and gone with the process: the last few that were
used, on the CPU while they are idle. As `held`, it is touched in ComfyUI's worker thread alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.rewards import Reward, Scoring, guard, make_reward
from dgpo_core.settings.config import NEUTRAL, RewardTerm
from dgpo_core.settings.gates import check_rewards

from ..common import host
from ..common.bounded import Bounded
from ..common.values import key_of

MOST_REWARDS = 4

_rewards: Bounded[Reward] = Bounded(MOST_REWARDS)


def require_ready(terms: Sequence[RewardTerm], prompts: Sequence[Prompt]) -> None:
    """Raises UserError for what would stop the scoring later: to be called before anything is drawn."""
    check_rewards(terms)
    with host.engine():
        guard.check_prompts({term.name: _reward(term) for term in terms}, prompts)


@contextmanager
def beside_drawing(terms: Sequence[RewardTerm], device: torch.device, group_size: int) -> Iterator[Scoring]:
    """To `start` each group as soon as it is drawn on `device`; then `results_of` all. Nothing of a reward stays on
    the accelerator."""
    check_rewards(terms)
    with host.engine():
        rewards = {term.name: _reward(term) for term in terms}
        try:
            with Scoring(rewards, device, group_size) as running:
                yield running
        finally:
            guard.idle(rewards)


def results_of(running: Scoring, groups: Sequence[Group]) -> list[Group]:
    """The groups with all scores. Raises UserError as `score_groups` does."""
    if running.after:  # what is scored beside drawing needs no room on the accelerator
        host.make_room()
    scored = []
    for outcome in running.results(groups):
        if isinstance(outcome, UserError):
            raise outcome
        scored.append(outcome)
    return scored


def score_all(groups: Sequence[Group], terms: Sequence[RewardTerm]) -> list[Group]:
    """Scored by every reward, as beside drawing."""
    with beside_drawing(terms, host.device(), max(map(len, groups), default=0)) as running:
        return results_of(running, groups)


def _reward(term: RewardTerm) -> Reward:
    """One that is ready; the one not used for longest goes."""
    if term.name in NEUTRAL:  # made in no time, and would only drive out what is not
        return make_reward(term.name, term.options, str(host.device()))
    key = key_of(term.name, term.options)
    return _rewards.take(key, lambda: make_reward(term.name, term.options, str(host.device())))
