"""Loaded rewards, and what nodes score with them. Bounded: `LOADED` at a time, on the CPU while they are idle."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.rewards import Reward, guard, make_reward, score_groups
from dgpo_core.settings.config import NEUTRAL, RewardTerm
from dgpo_core.settings.gates import check_rewards

from ..common import host
from ..common.values import key_of

LOADED = 4

_rewards: OrderedDict[str, Reward] = OrderedDict()


def prepare(terms: Sequence[RewardTerm], prompts: Sequence[Prompt]) -> None:
    """Raises UserError for what would stop the scoring later: to be called before anything is drawn."""
    check_rewards(terms)
    with host.engine():
        guard.check_prompts({term.name: _reward(term) for term in terms}, prompts)


def score_all(groups: Sequence[Group], terms: Sequence[RewardTerm]) -> list[Group]:
    """Scored by every reward; nothing of a reward stays on the accelerator."""
    check_rewards(terms)
    with host.engine():
        host.make_room()
        rewards = {term.name: _reward(term) for term in terms}
        try:
            return score_groups(groups, rewards)
        finally:
            guard.idle(rewards)


def _reward(term: RewardTerm) -> Reward:
    """One that is ready; the one not used for longest goes."""
    if term.name in NEUTRAL:  # made in no time, and would only drive out what is not
        return make_reward(term.name, term.options, str(host.device()))
    key = key_of(term.name, term.options)
    if key not in _rewards:
        while len(_rewards) >= LOADED:
            _rewards.popitem(last=False)
        _rewards[key] = make_reward(term.name, term.options, str(host.device()))
    _rewards.move_to_end(key)
    return _rewards[key]
