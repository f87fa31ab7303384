"""Who scores the groups of a loop: rewards, or a person. Each also tells without drawing what it has said before.

A person also sees, among the pictures of each group, one that the untrained model draws for the same prompt and seed,
at a place that only the question's key decides. It is not trained on: how often the others are put before it says
whether the training does what it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from comfy_execution.utils import get_executing_context

from dgpo_core.common.prompts import Prompt
from dgpo_core.people.apprentice import Apprentice
from dgpo_core.people.ask import FOLDER, answered, ask
from dgpo_core.people.questions import Answer
from dgpo_core.settings.config import HUMAN, RewardTerm

from ..common import host
from ..common.values import Groups, PolicyHandle, Sampler, key_of, scored_key, with_scores
from . import keys, scoring, sessions
from .questions import QUESTIONS

Places = Sequence[tuple[int, Prompt]]
Left, Check = Callable[[], float], Callable[[], None]
LEAST_WAIT_S = 300
"""Seconds that a person has at least for what was drawn for them."""


class Scored(NamedTuple):
    """Groups with scores, and what the record of the round is to say of them."""

    groups: Groups
    said: Mapping[str, float] = {}


class Judge(Protocol):
    """`terms`: what the scores are called, with their weights; `scores_alone`: whether nobody has to be there."""

    @property
    def terms(self) -> tuple[RewardTerm, ...]: ...

    @property
    def scores_alone(self) -> bool: ...

    def require_ready(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError for what would stop the scoring later: to be called before anything is drawn."""
        ...

    def groups(self, handle: PolicyHandle, places: Places, sampler: Sampler, left: Left, check: Check) -> Scored | None:
        """The groups that the handle's state draws, with scores; None where nobody said anything in about `left()`
        seconds."""
        ...

    def foretell(self, handle: PolicyHandle, drawn: str, sizes: Sequence[int]) -> str | None:
        """The key of the scored groups, by the key of those that the handle's state draws, and their sizes; None where
        nobody knows yet."""
        ...


@dataclass(frozen=True)
class ByRewards:
    """Scored by rewards of the engine."""

    terms: tuple[RewardTerm, ...]
    scores_alone = True

    def require_ready(self, prompts: Sequence[Prompt]) -> None:
        scoring.require_ready(self.terms, prompts)

    def groups(self, handle: PolicyHandle, places: Places, sampler: Sampler, left: Left, check: Check) -> Scored | None:
        return Scored(sessions.draw_scored(handle, places, sampler, handle.step, self.terms, check))

    def foretell(self, handle: PolicyHandle, drawn: str, sizes: Sequence[int]) -> str | None:
        return keys.scored(drawn, self.terms)


@dataclass(frozen=True)
class ByPerson:
    """Asked in the browser, in one of `questions.MODES`; what was answered before is not asked again."""

    mode: str
    terms: tuple[RewardTerm, ...] = field(default=(RewardTerm(HUMAN),), init=False)
    scores_alone = False

    def require_ready(self, prompts: Sequence[Prompt]) -> None:
        """People can judge anything."""

    def groups(self, handle: PolicyHandle, places: Places, sampler: Sampler, left: Left, check: Check) -> Scored | None:
        groups = sessions.draw(handle, places, sampler, handle.step, check)
        first = _places(groups.policy, groups.key, [len(group) for group in groups.groups])
        shown = _with_first(groups, first)
        answer = ask_person(shown, self.mode, 0, max(LEAST_WAIT_S, left()), check)
        if answer is None:
            return None
        rows, said = _apart(answer, [len(group) for group in shown.groups], first)
        return Scored(with_scores(groups, [score for row in rows for score in row], HUMAN), said)

    def foretell(self, handle: PolicyHandle, drawn: str, sizes: Sequence[int]) -> str | None:
        places = _places(handle, drawn, sizes)
        shown = [size + (place is not None) for size, place in zip(sizes, places, strict=True)]
        folder = host.runs_folder() / handle.spec.run / FOLDER
        answer = answered(folder, question_keys(drawn, len(sizes)), shown)
        if answer is None:
            return None
        rows, _ = _apart(answer, shown, places)
        return scored_key(drawn, HUMAN, [score for row in rows for score in row])


def _places(handle: PolicyHandle, drawn: str, sizes: Sequence[int]) -> list[int | None]:
    """Where in each group the picture of the untrained model is shown; nowhere before the first step."""
    return [int(key_of("first", drawn, g), 16) % (size + 1) if handle.step else None for g, size in enumerate(sizes)]


def _with_first(groups: Groups, places: Sequence[int | None]) -> Groups:
    """The groups as they are shown: with what the untrained model draws from the seed of each one's first image."""
    if None in places:
        return groups
    rows = [(group.prompt, [group.seeds[0]]) for group in groups.groups]
    shown = []
    drawn = sessions.draw_rows(groups.policy, None, rows, groups.sampler)
    for group, first, at in zip(groups.groups, drawn, places, strict=True):
        images = torch.cat([group.images[:at], first.images, group.images[at:]])
        shown.append(replace(group, seeds=(*group.seeds, group.seeds[0]), images=images))
    return replace(groups, groups=tuple(shown))


def _apart(
    answer: Answer, shown: Sequence[int], places: Sequence[int | None]
) -> tuple[list[list[float]], dict[str, float]]:
    """The scores of each group without the untrained model's picture; and what was said of that one."""
    rows, spoken = answer.rows(shown), answer.scores(shown)
    said = {"asked": len(rows), "ranked": sum(row is not None for row in spoken)}
    wins, against = 0.0, 0
    for row, is_said, at in zip(rows, spoken, places, strict=True):
        first = row.pop(at) if at is not None else None
        if first is not None and is_said is not None:
            wins += sum((score > first) + (score == first) / 2 for score in row)
            against += len(row)
    return rows, {**said, **({"wins": wins, "against": against} if against else {})}


def question_keys(drawn: str, groups: int) -> list[str]:
    """What the questions about drawn groups are called in the file of answers."""
    return [f"{drawn}-{g}" for g in range(groups)]


def ask_person(
    groups: Groups,
    mode: str,
    pairs: int,
    timeout_s: float,
    check: Check = host.stop_if_cancelled,
    apprentice: Apprentice | None = None,
) -> Answer | None:
    """From an earlier run over the same groups, else from a person, or an apprentice that is sure; None: nobody in
    time."""
    context, run = get_executing_context(), groups.policy.spec.run
    return ask(
        QUESTIONS,
        groups.groups,
        question_keys(groups.key, len(groups.groups)),
        host.runs_folder() / run / FOLDER,
        {"prompt_id": context.prompt_id, "node_id": context.node_id},
        mode=mode,
        pairs=pairs,
        timeout_s=timeout_s,
        check=check,
        shown={"subfolder": f"dgpo/{run}/{FOLDER}", "type": "output"},
        apprentice=apprentice,
    )


def by_person(groups: Groups, answer: Answer | None) -> Groups:
    """The groups with a person's scores; zeros, which train nothing, where nothing was said."""
    answer = answer or Answer.nothing(len(groups.groups))
    rows = answer.rows([len(group) for group in groups.groups])
    return with_scores(groups, [score for row in rows for score in row], HUMAN)
