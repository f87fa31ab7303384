"""Rewards together: conditions under which one counts ("ocr > 0.5"), and whether they fit."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgpo_core.common.errors import UserError
from dgpo_core.settings.config import Range, RewardTerm

if TYPE_CHECKING:
    from torch import Tensor

FORM = re.compile(r"\s*(?P<reward>[^<>?]*[^<>?\s])\s*(?P<sign>[<>])\s*(?P<bound>[^<>?\s]+)\s*")


@dataclass(frozen=True)
class Gate:
    """Passed by the samples whose score by `reward` is above `bound`, or below it where not `above`."""

    reward: str
    above: bool
    bound: float

    @staticmethod
    def of(text: str, reward: str) -> "Gate":
        """From "NAME > NUMBER" or "NAME < NUMBER". `reward`: whose gate it is. Raises UserError for anything else."""
        found = FORM.fullmatch(text)
        try:
            bound = float(found["bound"]) if found else float("nan")
        except ValueError:
            bound = float("nan")
        if not found or not abs(bound) < float("inf"):
            raise UserError(
                f"The condition of the reward {reward} must be a reward and a number, such as ocr > 0.5, not {text!r}."
            )
        return Gate(found["reward"], found["sign"] == ">", bound)

    def passed(self, scores: "Tensor") -> "Tensor":
        """Which samples pass, bool, by their scores of `reward`."""
        return scores > self.bound if self.above else scores < self.bound


def check_rewards(terms: Sequence[RewardTerm]) -> None:
    """Raises UserError where rewards cannot go together. A weight of 0 is for one that is only another's condition."""
    if not terms:
        raise UserError("There is no reward: give --reward NAME.")
    names = [term.name for term in terms]
    gates = {term.name: Gate.of(term.only_if, term.name) for term in terms if term.only_if}
    for term in terms:
        if names.count(term.name) > 1:
            raise UserError(f"The reward {term.name} is given more than once; give it once, with its weight.")
        asked = any(gate.reward == term.name for gate in gates.values())
        if not Range().holds(term.weight) or (term.weight == 0 and not asked):
            raise UserError(f"The weight of the reward {term.name} must be a number other than 0, not {term.weight:g}.")
    for name, gate in gates.items():
        if gate.reward not in names:
            raise UserError(
                f"The condition of the reward {name} asks for {gate.reward}, which is not among the rewards: add it,"
                " with a weight of 0 if it is not to count itself."
            )
    if not any(term.weight for term in terms):
        raise UserError("All rewards have a weight of 0: there is nothing to learn from.")
