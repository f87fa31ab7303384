"""A condition under which a reward counts: "ocr > 0.5"."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dgpo_core import advantage as adv
from dgpo_core.config import RewardTerm
from dgpo_core.errors import UserError

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

    def passed(self, scores: Tensor) -> Tensor:
        """Which samples pass, bool, by their scores of `reward`."""
        return scores > self.bound if self.above else scores < self.bound


def counted(scores: Mapping[str, Tensor], term: RewardTerm, weight: float) -> Tensor:
    """One reward's scores as they count with this weight: the group's worst where its condition is not met.

    scores: of all rewards, [..., G] each.
    """
    r = scores[term.name]
    if not term.only_if:
        return r
    gate = Gate.of(term.only_if, term.name)
    return adv.gated(r, gate.passed(scores[gate.reward]), weight)
