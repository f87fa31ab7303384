"""A reward under a condition: what it counts for where its gate is not passed."""

from collections.abc import Mapping

from torch import Tensor

from dgpo_core.method import advantage as adv
from dgpo_core.settings.config import RewardTerm
from dgpo_core.settings.gates import Gate


def counted(scores: Mapping[str, Tensor], term: RewardTerm, weight: float) -> Tensor:
    """One reward's scores as they count with this weight: the group's worst where its condition is not met.

    scores: of all rewards, [..., G] each.
    """
    r = scores[term.name]
    if not term.only_if:
        return r
    gate = Gate.of(term.only_if, term.name)
    return adv.gated(r, gate.passed(scores[gate.reward]), weight)
