"""What the Training Loop measures on the way: held-out prompts, in-domain and watched side by side, and the alarm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.evaluation.evaluator import Watch, side_by_side
from dgpo_core.evaluation.scores import Evaluation
from dgpo_core.policy import AdapterName
from dgpo_core.rewards import weights_of
from dgpo_core.settings.config import STATISTICS, RewardTerm

from ..common.values import PolicyHandle, Sampler
from . import sessions
from .states import State


@dataclass(frozen=True)
class Watching:
    """What to measure every `every` iterations, and whether an alarm ends the loop.

    trained: the rewards of the training; watched: others, besides the statistics. adapter: which one is measured.
    """

    prompts: tuple[Prompt, ...]
    sampler: Sampler
    trained: tuple[RewardTerm, ...]
    watched: tuple[RewardTerm, ...]
    every: int
    images: int
    adapter: AdapterName
    stops: bool

    def __post_init__(self) -> None:
        both = {term.name for term in self.trained} & {term.name for term in self.watched}
        if both:
            raise UserError(f"{min(both)} is trained, so it cannot be watched as well: leave it out of watch.")

    @property
    def terms(self) -> tuple[RewardTerm, ...]:
        """All that scores; a statistic that is trained is not watched."""
        named = [*self.trained, *self.watched]
        known = {term.name for term in named}
        return (*named, *(RewardTerm(name) for name in STATISTICS if name not in known))

    @property
    def watch(self) -> Watch:
        """Which of them says what."""
        trained = {name: weight for name, weight in weights_of(self.trained).items() if weight}
        return Watch(trained, trained, [term.name for term in self.terms if term.name not in trained])


@dataclass
class Log:
    """The evaluations of a run of the loop. asked: None where nothing is measured, and everything here is empty.

    ending: what is to be said of the state that is given out, after an alarm.
    """

    asked: Watching | None
    history: list[Evaluation] = field(default_factory=list)
    records: list[Mapping[str, Any]] = field(default_factory=list)
    ending: str = ""

    def recall(self, handle: PolicyHandle, state: State) -> None:
        """The base, and those of the states that led to this one, as far as they were measured before."""
        if not self.asked:
            return
        self._add(self._measure(handle, None))
        for step in range(self.asked.every, state.step, self.asked.every):
            self._add(sessions.evaluated(self.handle(handle, state, step), self.asked.adapter, *self._how()))
        self.look(handle)

    def look(self, handle: PolicyHandle) -> bool:
        """Measure this state if it is time to; whether it is the best so far."""
        if not self.asked or handle.step == 0 or handle.step % self.asked.every:
            return False
        self._add(self._measure(handle, self.asked.adapter))
        return self._best() is self.history[-1]

    @property
    def title(self) -> str:
        """What is trained, in a word."""
        return self.asked.watch.title if self.asked else ""

    @property
    def stopped(self) -> bool:
        """Whether an alarm ends the loop."""
        return bool(self.asked and self.asked.stops and self.asked.watch.alarms(self.history))

    def best(self, handle: PolicyHandle, state: State) -> PolicyHandle:
        """The state that measured best, of those that led to this one."""
        return self.handle(handle, state, self._best().iteration)

    def given_out(self, step: int, best: int) -> None:
        """Note which state the loop gives out after an alarm, and which measured best."""
        lost = f", as the best one (iteration {best}) is no longer kept" if step != best else ", the best before"
        self.ending = f"Stopped by an alarm: given out is the state after iteration {step}{lost}."

    def text(self) -> str:
        """The last evaluation and all alarms, in lines."""
        if not self.asked or not self.records:
            return ""
        alarms = [f"Warning: {alarm}" for alarm in self.asked.watch.alarms(self.history)]
        last = f"iteration {self.history[-1].iteration}: {side_by_side(self.records[-1])}"
        return "\n".join([last, *alarms, *filter(None, [self.ending])])

    def _best(self) -> Evaluation:
        return self.asked.watch.best(self.history)

    def _how(self) -> Sequence[Any]:
        return self.asked.prompts, self.asked.images, self.asked.sampler, self.asked.terms

    def _measure(self, handle: PolicyHandle, adapter: AdapterName | None) -> Evaluation:
        return sessions.evaluate(handle, adapter, *self._how())

    def _add(self, found: Evaluation | None) -> None:
        if found:
            self.history.append(found)
            self.records.append(self.asked.watch.record(self.history))

    @staticmethod
    def handle(handle: PolicyHandle, state: State, step: int) -> PolicyHandle:
        """The state after `step` steps, of those that led to this one."""
        if step == 0:
            return sessions.store(handle.spec).at(0)
        return PolicyHandle(handle.spec, step, state.line[step - 1])
