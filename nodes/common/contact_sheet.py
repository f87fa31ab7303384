"""Scored groups as one picture, and the numbers on it. Nothing here knows ComfyUI."""

from typing import Any

from torch import Tensor

from dgpo_core.common.group import Group
from dgpo_core.common.pictures import grid
from dgpo_core.method import advantage as adv
from dgpo_core.method.gating import counted
from dgpo_core.rewards import weights_of

from .values import Groups

SHEET_ROWS, SHEET_TILE = 8, 256  # groups on a contact sheet; pixels of an image's longer side on it


def contact_sheet(scored: Groups, title: str = "") -> Any:
    """A picture of the first groups with their scores and the two halves."""
    few = scored.groups[:SHEET_ROWS]
    scores = [combined(group, scored) for group in few]
    advantages = [adv.group_advantage(r[None])[0] for r in scores]
    names = ", ".join(term.name for term in scored.terms)
    return grid(few, title or f"iteration {scored.iteration}: {names}", scores, advantages, most=SHEET_TILE)


def combined(group: Group, scored: Groups) -> Tensor:
    """What the images of a group are trained by, [G]: the weighted sum, with conditions."""
    weights = weights_of(scored.terms)
    terms = [(weights[term.name], counted(group.scores, term, weights[term.name])) for term in scored.terms]
    return adv.weighted_sum(terms)
