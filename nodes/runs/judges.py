"""Who scores the groups of a loop: rewards, or a person. Each also tells without drawing what it has said before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from comfy_execution.utils import get_executing_context

from dgpo_core.common.prompts import Prompt
from dgpo_core.people.apprentice import Apprentice
from dgpo_core.people.ask import FOLDER, answered, ask
from dgpo_core.people.questions import Answer
from dgpo_core.settings.config import HUMAN, RewardTerm

from ..common import host
from ..common.values import Groups, PolicyHandle, Sampler, scored_key, with_scores
from . import keys, scoring, sessions
from .questions import QUESTIONS

Places = Sequence[tuple[int, Prompt]]
Left, Check = Callable[[], float], Callable[[], None]
LEAST_WAIT_S = 300
"""Seconds that a person has at least for what was drawn for them."""


class Judge(Protocol):
    """`terms`: what the scores are called, with their weights; `scores_alone`: whether nobody has to be there."""

    @property
    def terms(self) -> tuple[RewardTerm, ...]: ...

    @property
    def scores_alone(self) -> bool: ...

    def require_ready(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError for what would stop the scoring later: to be called before anything is drawn."""
        ...

    def groups(self, handle: PolicyHandle, places: Places, sampler: Sampler, left: Left, check: Check) -> Groups | None:
        """The groups that the handle's state draws, with scores; None where nobody said anything in about `left()`
        seconds."""
        ...

    def foretell(self, run: str, drawn: str, sizes: Sequence[int]) -> str | None:
        """The key of the scored groups, by the key of the drawn ones and their sizes; None where nobody knows yet."""
        ...


@dataclass(frozen=True)
class ByRewards:
    """Scored by rewards of the engine."""

    terms: tuple[RewardTerm, ...]
    scores_alone = True

    def require_ready(self, prompts: Sequence[Prompt]) -> None:
        scoring.require_ready(self.terms, prompts)

    def groups(self, handle: PolicyHandle, places: Places, sampler: Sampler, left: Left, check: Check) -> Groups | None:
        return sessions.draw_scored(handle, places, sampler, handle.step, self.terms, check)

    def foretell(self, run: str, drawn: str, sizes: Sequence[int]) -> str | None:
        return keys.scored(drawn, self.terms)


@dataclass(frozen=True)
class ByPerson:
    """Asked in the browser, in one of `questions.MODES`; what was answered before is not asked again."""

    mode: str
    terms: tuple[RewardTerm, ...] = field(default=(RewardTerm(HUMAN),), init=False)
    scores_alone = False

    def require_ready(self, prompts: Sequence[Prompt]) -> None:
        """People can judge anything."""

    def groups(self, handle: PolicyHandle, places: Places, sampler: Sampler, left: Left, check: Check) -> Groups | None:
        drawn = sessions.draw(handle, places, sampler, handle.step, check)
        answer = ask_person(drawn, self.mode, 0, max(LEAST_WAIT_S, left()), check)
        return None if answer is None else by_person(drawn, answer)

    def foretell(self, run: str, drawn: str, sizes: Sequence[int]) -> str | None:
        answer = answered(host.runs_folder() / run / FOLDER, question_keys(drawn, len(sizes)), sizes)
        if answer is None:
            return None
        return scored_key(drawn, HUMAN, [score for row in answer.rows(sizes) for score in row])


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
