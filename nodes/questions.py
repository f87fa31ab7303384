"""Questions to a person while a prompt waits: who asks, who answers, and the file that keeps the answers.

Nothing here knows ComfyUI: the node gives in how browsers are told and what interrupts a wait.
"""

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgpo_core.errors import UserError
from dgpo_core.files import reason
from dgpo_core.preferences import scores_from

POLL_S = 0.2
MODES = ("rank", "thumbs")
OPENED, CLOSED = "dgpo.question", "dgpo.question_closed"

Notify = Callable[[str, Mapping[str, Any]], None]


class UnknownQuestion(UserError):
    """There is no such question, or no longer."""


@dataclass(frozen=True)
class AskedGroup:
    """What a person sees of a group: its prompt and its images as {filename, subfolder, type}."""

    prompt: str
    images: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Question:
    """Which images are better? `token` is its own alone; `mode`, of MODES, is how the dialog asks."""

    prompt_id: str
    node_id: str
    groups: tuple[AskedGroup, ...]
    mode: str = "rank"
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def key(self) -> dict[str, str]:
        """What tells it from all others."""
        return {"token": self.token, "prompt_id": self.prompt_id, "node_id": self.node_id}

    @property
    def sizes(self) -> list[int]:
        """Images per group."""
        return [len(group.images) for group in self.groups]


@dataclass(frozen=True)
class Answer:
    """What was said about each group, as `dgpo_core.preferences` describes it."""

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
        groups = [{"prompt": group.prompt, "images": list(group.images)} for group in self.question.groups]
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

        What `check` raises, some times a second, ends the wait. `save` is given a valid answer before it counts as
        given; where it raises, the question stays open.
        """
        waiting = _Waiting(question, time.monotonic() + timeout_s if timeout_s > 0 else None, save)
        with self._lock:
            self._open[question.token] = waiting
        outcome = "cancelled"
        try:
            self._notify(OPENED, waiting.as_json())
            waiting.wait(check)
            outcome = "timeout"
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
            waiting = self._open.get(token)
            if waiting is None or waiting.answer is not None:
                raise UnknownQuestion("This question is not open: it was answered or cancelled, or its time ran out.")
            if not isinstance(payload, Mapping):
                raise UserError('The answer must be an object: {"token": ..., "groups": [{"ranking": [[0], [1]]}]}.')
            if payload.get("token", token) != token:
                raise UserError("The token of the answer is not that of the address it was sent to.")
            answer = Answer.of(payload.get("groups"), waiting.question.sizes)
            waiting.save(answer)
            waiting.answer = answer
        waiting.answered.set()

    def pending(self) -> list[dict[str, Any]]:
        """The open questions as JSON, oldest first, with the seconds that are left to answer (None: no limit)."""
        with self._lock:
            return [waiting.as_json() for waiting in self._open.values() if waiting.answer is None]


class AnswerFile:
    """Answers by key, one per line of a .jsonl file: what was answered before a crash is not asked again."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def get(self, key: str, sizes: Sequence[int]) -> Answer | None:
        """The newest answer under `key`. Lines that a crash cut short, or that do not fit the groups, do not count."""
        for line in reversed(self._read().splitlines()):
            try:
                record = json.loads(line)
                if record["key"] == key:
                    return Answer.of(record["groups"], sizes)
            except (ValueError, KeyError, TypeError, UserError):
                continue
        return None

    def put(self, key: str, answer: Answer) -> None:
        """Adds an answer; it is on the disk when this returns. Raises UserError for what the system refuses."""
        line = json.dumps({"key": key, "groups": list(answer.groups), "time": round(time.time())}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = self._read()
            torn = bool(before) and not before.endswith("\n")
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + line if torn else line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"Cannot write {self.path}: {reason(error)}.") from error

    def _read(self) -> str:
        return self.path.read_text("utf-8", errors="replace") if self.path.exists() else ""


def add_routes(routes: Any, questions: Questions) -> None:
    """GET /dgpo/questions lists the open ones; POST /dgpo/questions/{token} answers one."""
    from aiohttp import web

    @routes.get("/dgpo/questions")
    async def pending(_: web.Request) -> web.Response:
        return web.json_response({"questions": questions.pending()})

    @routes.post("/dgpo/questions/{token}")
    async def answer(request: web.Request) -> web.Response:
        try:
            questions.answer(request.match_info["token"], await request.json())
        except UnknownQuestion as error:
            return web.json_response({"error": str(error)}, status=404)
        except UserError as error:
            return web.json_response({"error": str(error)}, status=400)
        except ValueError:
            return web.json_response({"error": "The answer must be JSON."}, status=400)
        return web.json_response({})
