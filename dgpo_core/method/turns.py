"""Whose turn it is: prompts in the order of a stream, but those that taught nothing are passed over for a while.

A group of equal rewards, all right or all wrong, has nothing to compare. What comes next depends on nothing but the
stream's seed and on what was learned so far, so a resumed run goes on as one that was never stopped.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt, PromptStream


class Turns:
    """A prompt whose last group taught nothing is passed over the next `pass_over` times that its turn comes.

    So none is drawn less often than every `pass_over` + 1 rounds. taken: turns so far; resting: by a prompt's number,
    how often it will still be passed over.
    """

    def __init__(self, stream: PromptStream[Prompt], pass_over: int) -> None:
        self.stream, self.pass_over = stream, pass_over
        self.taken = 0
        self.resting: dict[int, int] = {}

    def next(self) -> "Drawn":
        """Who comes in the next iteration; nothing is taken yet.

        Where all rest, they are drawn all the same; none comes twice unless there are too few.
        """
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
        return Drawn(tuple(numbers), taken, resting)

    def take(self, drawn: "Drawn", taught: Mapping[int, bool]) -> None:
        """The iteration is done. taught: by the numbers of its prompts, whether their groups taught anything."""
        self.taken, self.resting = drawn.taken, dict(drawn.resting)
        for number, flag in taught.items():
            _rest(self.resting, number, 0 if flag else self.pass_over)

    def ahead(self, iterations: int) -> Iterator[Prompt]:
        """Every prompt that may come in so many iterations, in order: those of the round while none is passed over in
        it, else all."""
        turns, all_of_them = iterations * self.stream.per_iteration, len(self.stream.prompts)
        if self.resting or self.taken % all_of_them + turns > all_of_them:
            turns = 2 * all_of_them  # wherever in a round they begin
        for turn in range(self.taken, self.taken + turns):
            yield self.stream.prompts[self.stream.number(turn)]

    # --- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {"taken": self.taken, "resting": {str(number): times for number, times in self.resting.items()}}

    def load_state(self, state: Any) -> None:
        """The inverse of `state`. Raises UserError for what is none, or one of other prompts."""
        try:
            taken, resting = int(state["taken"]), {int(key): int(times) for key, times in state["resting"].items()}
        except (TypeError, KeyError, ValueError, AttributeError):
            raise UserError("The checkpoint does not say which prompts are to be passed over.") from None
        if taken < 0 or not all(0 <= number < len(self.stream.prompts) for number in resting):
            raise UserError("The checkpoint is of other prompts: start a new run.")
        self.taken, self.resting = taken, resting


@dataclass(frozen=True)
class Drawn:
    """The numbers of an iteration's prompts, and what `Turns` holds once they are drawn."""

    numbers: tuple[int, ...]
    taken: int
    resting: Mapping[int, int]


def _rest(resting: dict[int, int], number: int, times: int) -> None:
    if times > 0:
        resting[number] = times
    else:
        resting.pop(number, None)
