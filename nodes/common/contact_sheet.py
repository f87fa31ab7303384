"""Scored groups as one picture, and the numbers on it. Nothing here knows ComfyUI."""

from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dgpo_core.common.group import Group
from dgpo_core.common.pictures import fitted, grid, to_pil
from dgpo_core.method import advantage as adv
from dgpo_core.method.gating import counted
from dgpo_core.rewards import weights_of

from .values import Groups

CLOSE_ROWS, CLOSE_ENDS, CLOSE_TILE = 2, 2, 256  # of a close-up: groups, images at either end, pixels of a longer side
CLOSE_LINE, CLOSE_GAP = 40, 12  # pixels
SHEET_ROWS, SHEET_TILE = 8, 256  # groups on a contact sheet; pixels of an image's longer side on it


def contact_sheet(scored: Groups, title: str = "") -> Any:
    """A picture of the first groups with their scores and the two halves; of groups without scores the images alone."""
    few = scored.groups[:SHEET_ROWS]
    if not scored.terms:
        return grid(few, title or f"iteration {scored.iteration}", most=SHEET_TILE)
    scores = [combined(group, scored) for group in few]
    advantages = [adv.group_advantage(r[None])[0] for r in scores]
    names = ", ".join(term.name for term in scored.terms)
    return grid(few, title or f"iteration {scored.iteration}: {names}", scores, advantages, most=SHEET_TILE)


def close_up(scored: Groups) -> Image.Image:
    """A few images of the first groups, the best and the worst of each, large enough to be looked at on a node, with
    their scores in large letters; framed as in `contact_sheet`. Of edits what they were made of stands before them.
    """
    groups = scored.groups[:CLOSE_ROWS]
    height, width = groups[0].images.shape[-2:]
    zoom = CLOSE_TILE / max(height, width)
    size, smooth = (round(width * zoom), round(height * zoom)), Image.Resampling.LANCZOS
    if zoom >= 1:
        smooth = Image.Resampling.NEAREST
    before = max(len(group.prompt.sources) for group in groups)
    shown = min(2 * CLOSE_ENDS, max(len(group) for group in groups))
    columns = before + shown
    step, row = size[0] + CLOSE_GAP, CLOSE_LINE + size[1] + CLOSE_LINE + CLOSE_GAP
    sheet = Image.new("RGB", (CLOSE_GAP + columns * step, CLOSE_GAP + len(groups) * row), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=CLOSE_LINE - 8)
    for y, group in enumerate(groups):
        scores, top = combined(group, scored), CLOSE_GAP + y * row
        favour = adv.group_advantage(scores[None])[0]
        pen.text((CLOSE_GAP, top), group.prompt.text, fill="black", font=font)
        order = scores.argsort(descending=True, stable=True).tolist()
        ends = order if len(order) <= shown else [*order[:CLOSE_ENDS], *order[-CLOSE_ENDS:]]
        for x, source in enumerate(group.sources):
            at = CLOSE_GAP + x * step, top + CLOSE_LINE
            sheet.paste(fitted(source, size, smooth), at)
            pen.text((at[0], at[1] + size[1] + 3), "source", fill="dimgray", font=font)
        for x, i in enumerate(ends, start=before):
            left, below = CLOSE_GAP + x * step, top + CLOSE_LINE
            sheet.paste(to_pil(group.images[i]).resize(size, smooth), (left, below))
            colour = "forestgreen" if favour[i] > 0 else "crimson" if favour[i] < 0 else "gray"
            pen.rectangle((left - 3, below - 3, left + size[0] + 2, below + size[1] + 2), outline=colour, width=3)
            pen.text((left, below + size[1] + 3), f"{float(scores[i]):.2f}", fill=colour, font=font)
    return sheet


def combined(group: Group, scored: Groups) -> Tensor:
    """What the images of a group are trained by, [G]: the weighted sum, with conditions; 0 where nothing scored."""
    if not scored.terms:
        return torch.zeros(len(group))
    weights = weights_of(scored.terms)
    terms = [(weights[term.name], counted(group.scores, term, weights[term.name])) for term in scored.terms]
    return adv.weighted_sum(terms)
