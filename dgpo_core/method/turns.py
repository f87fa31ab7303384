"""Whose turn it is: prompts in the order of a stream, or of those the ones that taught nothing passed over for a while.

A group of equal rewards, all right or all wrong, has nothing to compare. What comes next depends on nothing but the
stream's seed and on what was learned so far, so a resumed run goes on as one that was never stopped.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from dgpo_core.common.distributed import World
from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt, PromptStream, digest_of_prompts


@dataclass(frozen=True)
class Drawn:
    """An iteration's prompts."""

    prompts: tuple[Prompt, ...]


class Turns(ABC):
    """Which prompts an iteration draws."""

    def __init__(self, stream: PromptStream[Prompt]) -> None:
        self.stream = stream

    @staticmethod
    def of(stream: PromptStream[Prompt], pass_over: int) -> "Turns":
        """Those of the setting `data.pass_over`."""
        return PassingOver(stream, pass_over) if pass_over else InOrder(stream)

    @cached_property
    def digest(self) -> str:
        """What tells these prompts from others."""
        return digest_of_prompts(self.stream.prompts)

    @abstractmethod
    def next(self, iteration: int) -> Drawn:
        """Whose turn it is in this iteration; nothing is taken yet."""

    @abstractmethod
    def ahead(self, iterations: range, world: World) -> Iterator[Prompt]:
        """Every prompt that these iterations may give this process, in order, some more than once."""

    def take(self, drawn: Any, taught: Mapping[int, bool]) -> None:  # noqa: B027 - it may learn nothing
        """The iteration is done. taught: by the places of the prompts of all processes, whether their groups taught
        anything."""

    def state(self) -> dict[str, Any]:
        """For JSON, beside a step's own."""
        return {}

    def load_state(self, info: Mapping[str, Any]) -> None:  # noqa: B027 - as above
        """The inverse of `state`. Raises UserError for what holds none, or one of other prompts."""


class InOrder(Turns):
    """As the stream has them."""

    def next(self, iteration: int) -> Drawn:
        return Drawn(tuple(self.stream.at(iteration)))

    def ahead(self, iterations: range, world: World) -> Iterator[Prompt]:
        return chain.from_iterable(world.share(self.stream.at(iteration)) for iteration in iterations)


class PassingOver(Turns):
    """A prompt whose last group taught nothing is passed over the next `pass_over` times that its turn comes.

    So none is drawn less often than every `pass_over` + 1 rounds. taken: turns so far; resting: by a prompt's number,
    how often it will still be passed over.
    """

    def __init__(self, stream: PromptStream[Prompt], pass_over: int) -> None:
        super().__init__(stream)
        self.pass_over = pass_over
        self.taken = 0
        self.resting: dict[int, int] = {}

    def next(self, iteration: int) -> "DrawnOf":
        """Where all rest, they are drawn all the same; none comes twice unless there are too few."""
        numbers: list[int] = []
        resting, taken, passed = dict(self.resting), self.taken, 0
        while len(numbers) < self.stream.per_iteration:
            number = self.stream.number(taken)
            taken += 1
            rests = resting.get(number, 0)
            if (rests or number in numbers) and passed < len(self.stream.prompts):
                passed += 1
                _rest(resting, number, rests - 1)
            else:
                numbers.append(number)
        return DrawnOf(tuple(self.stream.prompts[number] for number in numbers), tuple(numbers), taken, resting)

    def take(self, drawn: "DrawnOf", taught: Mapping[int, bool]) -> None:
        self.taken, self.resting = drawn.taken, dict(drawn.resting)
        for place, flag in taught.items():
            _rest(self.resting, drawn.numbers[place], 0 if flag else self.pass_over)

    def ahead(self, iterations: range, world: World) -> Iterator[Prompt]:
        """Those of the round while none is passed over in it, else all; any process may be given them."""
        turns, all_of_them = len(iterations) * self.stream.per_iteration, len(self.stream.prompts)
        if self.resting or self.taken % all_of_them + turns > all_of_them:
            turns = 2 * all_of_them  # wherever in a round they begin
        for turn in range(self.taken, self.taken + turns):
            yield self.stream.prompts[self.stream.number(turn)]

    # --- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        resting = {str(number): times for number, times in self.resting.items()}
        return {"turns": {"taken": self.taken, "resting": resting, "of": self.digest}}

    def load_state(self, info: Mapping[str, Any]) -> None:
        state: Any = info.get("turns")
        try:
            taken, resting = int(state["taken"]), {int(key): int(times) for key, times in state["resting"].items()}
            known = state.get("of", self.digest) == self.digest
        except (TypeError, KeyError, ValueError, AttributeError):
            raise UserError("The checkpoint does not say which prompts are to be passed over.") from None
        resting = resting if known else {}  # of others, nothing is known yet
        if taken < 0 or not all(0 <= number < len(self.stream.prompts) for number in resting):
            raise UserError("The checkpoint is of other prompts: start a new run.")
        self.taken, self.resting = taken, resting


@dataclass(frozen=True)
class DrawnOf(Drawn):
    """An iteration's prompts, their numbers, and what `PassingOver` holds once they are drawn."""

    numbers: tuple[int, ...]
    taken: int
    resting: Mapping[int, int]


def _rest(resting: dict[int, int], number: int, times: int) -> None:
    if times > 0:
        resting[number] = times
    else:
        resting.pop(number, None)
