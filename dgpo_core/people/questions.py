"""Questions to a person while a run waits: who asks, who answers.

ComfyUI's node and the headless page both ask through this: they give in how browsers are told, what interrupts a wait,
and where answers are kept.
"""

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.people.pairs import next_pair, pairs_scores, pairs_wanted
from dgpo_core.people.preference_file import Preference
from dgpo_core.people.preferences import SKIP, check_pairs, scores_from

POLL_S = 0.2
MODES = ("rank", "thumbs", "pairs")
OPENED, CLOSED = "dgpo.question", "dgpo.question_closed"

Notify = Callable[[str, Mapping[str, Any]], None]


class UnknownQuestion(UserError):
    """There is no such question, or no longer."""


@dataclass(frozen=True)
class AskedGroup:
    """What a person sees of a group: its prompt and its images as {"filename": ...} and what else a browser needs.

    sources: the pictures that they are made of, likewise.
    """

    prompt: str
    images: tuple[Mapping[str, str], ...]
    sources: tuple[Mapping[str, str], ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the images' files."""
        return tuple(image["filename"] for image in self.images)

    @property
    def source_files(self) -> tuple[str, ...]:
        """Those of the sources."""
        return tuple(source["filename"] for source in self.sources)


@dataclass(frozen=True)
class Question:
    """Which images are better?

    asker: who wants to know, told to the browser with the rest. mode: of MODES, how the dialog asks. pairs: per group,
    where it asks for pairs; 0 as `pairs_wanted` has it. token: its own.
    """

    asker: Mapping[str, str]
    groups: tuple[AskedGroup, ...]
    mode: str = "rank"
    pairs: int = 0
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def key(self) -> dict[str, str]:
        """What tells it from all others."""
        return {"token": self.token, **self.asker}

    @property
    def sizes(self) -> list[int]:
        """Images per group."""
        return [len(group.images) for group in self.groups]

    def next(self, said: Any) -> dict[str, Any]:
        """After {"group": 0, "pairs": [...]}, what was said about a group so far: the "pair" to ask about next, as
        [left, right], or None after the last one; and the "scores" that it comes to.

        Raises UserError in one sentence for what is nothing of that.
        """
        group = said.get("group") if isinstance(said, Mapping) else None
        if type(group) is not int or not 0 <= group < len(self.groups):
            raise UserError('What was said so far must be an object: {"group": 0, "pairs": [[0, ">", 1]]}.')
        pairs, size = said.get("pairs"), self.sizes[group]
        check_pairs(pairs, size)
        return {"pair": next_pair(pairs, size, pairs_wanted(size, self.pairs)), "scores": pairs_scores(pairs, size)}


@dataclass(frozen=True)
class Answer:
    """What was said about each group, as `dgpo_core.people.preferences` describes it."""

    groups: tuple[Mapping[str, Any], ...]

    @staticmethod
    def of(groups: Any, sizes: Sequence[int]) -> "Answer":
        """Raises UserError in one sentence where `groups` is no answer about groups of these sizes."""
        if not isinstance(groups, list) or len(groups) != len(sizes):
            raise UserError(f'"groups" must be a list with one answer for each of the {len(sizes)} groups.')
        for group, size in zip(groups, sizes, strict=True):
            scores_from(group, size)
        return Answer(tuple(groups))

    def scores(self, sizes: Sequence[int]) -> list[list[float] | None]:
        """Scores per group; None where nothing was said."""
        return [scores_from(group, size) for group, size in zip(self.groups, sizes, strict=True)]

    def rows(self, sizes: Sequence[int]) -> list[list[float]]:
        """Scores per group; zeros, which train nothing, where nothing was said."""
        return [row or [0.0] * size for row, size in zip(self.scores(sizes), sizes, strict=True)]

    def preferences(self, groups: Sequence[AskedGroup], keys: Sequence[str]) -> list[Preference]:
        """As a preference file holds it; `keys` are the questions', one for each group."""
        rows = zip(groups, self.groups, keys, strict=True)
        return [Preference(g.prompt, g.files, said, key, sources=g.source_files) for g, said, key in rows]

    @staticmethod
    def nothing(groups: int) -> "Answer":
        """Nothing was said about so many groups."""
        return Answer((SKIP,) * groups)


@dataclass
class _Waiting:
    """A question that is open. `deadline` on the monotonic clock; None waits for ever."""

    question: Question
    deadline: float | None
    save: Callable[[Answer], None]
    answered: threading.Event = field(default_factory=threading.Event)
    answer: Answer | None = None

    def seconds_left(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def wait(self, check: Callable[[], None]) -> None:
        """Until there is an answer or the time is over; `check` raises to give up."""
        while not self.answered.wait(POLL_S):
            check()
            if self.seconds_left() == 0:
                return

    def as_json(self) -> dict[str, Any]:
        groups = [
            {
                "prompt": g.prompt,
                "sources": list(g.sources),
                "images": list(g.images),
                "pairs": pairs_wanted(len(g.images), self.question.pairs),
            }
            for g in self.question.groups
        ]
        left = self.seconds_left()
        return {**self.question.key, "mode": self.question.mode, "groups": groups, "seconds_left": left}


class Questions:
    """The open questions. `notify` is told, by name of the event and its data, when one opens and when it closes."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._lock = threading.Lock()
        self._open: dict[str, _Waiting] = {}

    def ask(
        self,
        question: Question,
        timeout_s: float,
        check: Callable[[], None],
        save: Callable[[Answer], None] = lambda answer: None,
    ) -> Answer | None:
        """Blocks until somebody answers; None where nobody does within `timeout_s` seconds (0: wait for ever).

        What `check` raises, some times a second, ends the wait; pages are told its `outcome`, else that it was
        cancelled. `save` is given a valid answer before it counts as given; where it raises, the question stays open.
        """
        waiting = _Waiting(question, time.monotonic() + timeout_s if timeout_s > 0 else None, save)
        with self._lock:
            self._open[question.token] = waiting
        outcome = "cancelled"
        try:
            self._notify(OPENED, waiting.as_json())
            waiting.wait(check)
            outcome = "timeout"
        except BaseException as ending:
            outcome = getattr(ending, "outcome", outcome)
            raise
        finally:
            with self._lock:
                del self._open[question.token]
            if waiting.answer is not None:
                outcome = "answered"
            self._notify(CLOSED, {**question.key, "outcome": outcome})
        return waiting.answer

    def answer(self, token: str, payload: Any) -> None:
        """Gives {"token": ..., "groups": [...]} to who waits for it; the first valid answer counts.

        Raises UnknownQuestion for a question that is not open, UserError for what is no answer to it.
        """
        with self._lock:
            waiting = self._find(token)
            if not isinstance(payload, Mapping):
                raise UserError('The answer must be an object: {"token": ..., "groups": [{"ranking": [[0], [1]]}]}.')
            if payload.get("token", token) != token:
                raise UserError("The token of the answer is not that of the address it was sent to.")
            answer = Answer.of(payload.get("groups"), waiting.question.sizes)
            waiting.save(answer)
            waiting.answer = answer
        waiting.answered.set()

    def next(self, token: str, said: Any) -> dict[str, Any]:
        """What `Question.next` says. Raises UnknownQuestion for a question that is not open, else as it does."""
        with self._lock:
            question = self._find(token).question
        return question.next(said)

    def _find(self, token: str) -> _Waiting:
        waiting = self._open.get(token)
        if waiting is None or waiting.answer is not None:
            raise UnknownQuestion("This question is not open: it was answered or cancelled, or its time ran out.")
        return waiting

    def pending(self) -> list[dict[str, Any]]:
        """The open questions as JSON, oldest first, with the seconds that are left to answer (None: no limit)."""
        with self._lock:
            return [waiting.as_json() for waiting in self._open.values() if waiting.answer is None]
