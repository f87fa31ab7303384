"""The shapes world's verifier: finds the objects in a picture and verifies them against a prompt's metadata.

Plain numpy and scipy, deterministic, no learned part. An object is a connected region that differs from the ground; its
shape is the ideal outline that overlaps it best, its colour the nearest palette colour of its core.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from dgpo_core.demo.world import COLOURS, SHAPES, holds, outline

FOREGROUND = 0.22  # least distance from the ground's colour, RGB in [0, 1]
SPECK = 10  # regions of fewer pixels are ignored
LEAST_AREA = 60  # pixels of the smallest whole object; anything between is debris and counts as a wrong object
LEAST_OVERLAP = 0.75  # intersection over union with the ideal outline
COLOUR_REACH = 0.30  # greatest distance from a palette colour, RGB in [0, 1]
RELATION_MARGIN = 6.0  # pixels between the centres

_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32) / 255.0
_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Found:
    """One object in a picture; `shape` or `color` is None where it is no clear one."""

    shape: str | None
    color: str | None
    x: float
    y: float
    area: int


def find_objects(image: np.ndarray) -> list[Found]:
    """Every object of `image` (float [H, W, 3] in [0, 1])."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    ground = np.median(border, axis=0)
    distance = np.sqrt(np.square(image - ground).sum(axis=2))
    labels, _ = ndimage.label(distance > FOREGROUND)
    found = []
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[window] == index
        if mask.sum() >= SPECK:
            found.append(_describe(image[window], distance[window], mask, window))
    return found


def _describe(crop: np.ndarray, distance: np.ndarray, mask: np.ndarray, window: tuple[slice, slice]) -> Found:
    rows, columns = np.nonzero(mask)
    y, x = rows.mean() + window[0].start + 0.5, columns.mean() + window[1].start + 0.5
    area = len(rows)
    if area < LEAST_AREA:
        return Found(None, None, x, y, area)
    away = distance[rows, columns]
    core = away >= np.median(away)  # the half that is farthest from the ground: no edge in it
    # the edge is where the picture is half-way between ground and object: blur moves no outline then
    body = mask & (distance > 0.5 * away[core].mean())
    gap = np.linalg.norm(_PALETTE - crop[rows[core], columns[core]].mean(axis=0), axis=1)
    color = _NAMES[int(gap.argmin())] if gap.min() < COLOUR_REACH else None
    return Found(_shape_of(body), color, x, y, area)


def _shape_of(body: np.ndarray) -> str | None:
    rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
    if len(rows) == 0:
        return None
    body = body[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if not 0.7 < body.shape[0] / body.shape[1] < 1.43:
        return None
    area = np.count_nonzero(body)
    overlaps = []
    for shape in SHAPES:
        ideal, its_area = _ideal(shape, *body.shape)
        both = np.count_nonzero(body & ideal)
        overlaps.append(both / (area + its_area - both))
    best = int(np.argmax(overlaps))
    return SHAPES[best] if overlaps[best] >= LEAST_OVERLAP else None


@lru_cache(maxsize=4096)
def _ideal(shape: str, height: int, width: int) -> tuple[np.ndarray, int]:
    """The shape filling a box of height x width pixels, bool [height, width], and its area."""
    points = np.array(outline(shape, 0.0, 0.0, 1.0))
    low, high = points.min(0), points.max(0)
    scaled = (points - low) / (high - low) * np.array([width, height]) * 8
    canvas = Image.new("L", (width * 8, height * 8))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in scaled], fill=255)
    mask = np.asarray(canvas.reduce(8)) > 127
    return mask, int(np.count_nonzero(mask))


def verify(image: np.ndarray, metadata: Mapping[str, Any]) -> tuple[bool, float]:
    """(exactly right, share of what was asked in [0, 1]) for one image, float [H, W, 3] in [0, 1].

    The share is 1 exactly where the image is exactly right: every asked object is there in its shape and colour, none
    is too many, and the relation holds.
    """
    wanted = [(e["shape"], e.get("color")) for e in metadata["include"] for _ in range(e.get("count", 1))]
    found = find_objects(image)
    match, pairs = _assign(wanted, found)
    objects = match / max(len(wanted), len(found), 1)
    relation = metadata.get("relation")
    if not relation:
        share = objects
    else:
        share = 0.6 * objects + 0.4 * (len(pairs) == 2 and _relation_holds(relation, found, pairs))
    return bool(share > 1 - 1e-6), float(share)


def _assign(wanted: Sequence[tuple[str, str | None]], found: Sequence[Found]) -> tuple[float, dict[int, int]]:
    """Total likeness (1 per object right in shape and colour) of the best pairing, and the pairing {wanted: found}."""
    if not wanted or not found:
        return 0.0, {}
    likeness = np.array([[_likeness(shape, color, f) for f in found] for shape, color in wanted])
    rows, columns = linear_sum_assignment(-likeness)
    pairs = {int(r): int(c) for r, c in zip(rows, columns, strict=True) if likeness[r, c] > 0}
    return float(likeness[rows, columns].sum()), pairs


def _likeness(shape: str, color: str | None, found: Found) -> float:
    if found.shape is None or found.color is None:  # debris, a malformed or a colourless thing
        return 0.0
    return 0.5 * (found.shape == shape) + 0.5 * (color is None or found.color == color)


def _relation_holds(relation: str, found: Sequence[Found], pairs: Mapping[int, int]) -> bool:
    a, b = found[pairs[0]], found[pairs[1]]
    return holds(relation, a.x, a.y, b.x, b.y, RELATION_MARGIN)
