"""GenEval's rules: from what a detector found in a picture to what is right in it. Pure functions.

Source: https://github.com/djghosh13/geneval, evaluation/evaluate_images.py (MIT), https://arxiv.org/abs/2310.11513.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dgpo_core.errors import UserError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""A detection counts with a score above the first; in counting tasks, above the second."""
POSITION_THRESHOLD = 0.1
"""Objects whose centres are less than this share of their added sizes apart are not beside each other."""
MAX_OBJECTS = 16
"""More objects of one class are not looked at."""


@dataclass(frozen=True, eq=False)
class Detection:
    """One object. box: left, top, right, bottom in pixels. mask: bool [H, W] of its pixels, if the detector has it."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None


ColorsOf = Callable[[Sequence[Detection], str], Sequence[str]]
"""From detections of a class to the colour of each."""


def check_metadata(prompt: str, metadata: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Raises UserError, naming the prompt, for metadata that is not GenEval's or asks for an unknown class.

    metadata: {"tag": one of TAGS, "include": [{"class": ..., "count": 1, ...}, ...], "exclude": [...]}; an object of
    "include" may have a "color", and a "position": [relation, number of an earlier object]; "exclude" may be left out.
    """
    problem = _problem(metadata, classes)
    if problem:
        raise UserError(f"The reward 'geneval' cannot judge the prompt {prompt!r}: {problem}.")


def _problem(metadata: Mapping[str, Any], classes: Sequence[str]) -> str:
    if metadata.get("tag") not in TAGS:
        return f'its metadata must have a "tag", one of {", ".join(TAGS)}, not {metadata.get("tag")!r}'
    include, exclude = metadata.get("include"), metadata.get("exclude", [])
    if not isinstance(include, list) or not include or not isinstance(exclude, list):
        return 'its metadata must have a list "include" with at least one object, and "exclude" must be a list'
    for index, wish in enumerate([*include, *exclude]):
        if not isinstance(wish, Mapping) or str(wish.get("class")) not in classes:
            return f"the detector does not know the class in {wish!r}"
        if isinstance(wish.get("count"), bool) or not isinstance(wish.get("count"), int) or wish["count"] < 1:
            return f'"count" must be a whole number of at least 1 in {wish!r}'
        if "color" in wish and wish["color"] not in COLORS:
            return f'"color" must be one of {", ".join(COLORS)} in {wish!r}'
        if "position" in wish and not _is_position(wish["position"], index):
            return f'"position" must be [relation, number of an earlier object], such as ["left of", 0], in {wish!r}'
    return ""


def _is_position(position: Any, index: int) -> bool:
    if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
        return False
    return isinstance(position[1], int) and 0 <= position[1] < index


def by_class(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """What counts, by class, best first: above the threshold of the task, and at most MAX_OBJECTS of a class."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: d.score, reverse=True):
        found = objects.setdefault(detection.label, [])
        if detection.score > threshold and len(found) < MAX_OBJECTS:
            found.append(detection)
    return objects


def parts(objects: Mapping[str, Sequence[Detection]], metadata: Mapping[str, Any], colors_of: ColorsOf) -> list[float]:
    """How far each thing that was asked for is there, each 0 to 1; all are 1 exactly where GenEval says "correct".

    Per object of "include": the share of its count that was found; if a colour is asked for, the share of its count
    that has it; if a position is, the share of pairs that stand so. Only the `count` best detections are looked at.
    Per object of "exclude": 1 for fewer than its count, less 1 / count for each from there on.
    """
    shares, groups = [], []
    for wish in metadata["include"]:
        count = wish["count"]
        found = list(objects.get(wish["class"], ()))[:count]
        groups.append(found)
        shares.append(len(found) / count)
        if "color" in wish:
            shares.append(list(colors_of(found, wish["class"])).count(wish["color"]) / count if found else 0.0)
        if "position" in wish:
            relation, target = wish["position"]
            pairs = [relation in relations(a.box, b.box) for a in found for b in groups[target]]
            shares.append(sum(pairs) / len(pairs) if pairs else 0.0)
    for wish in metadata.get("exclude", ()):
        over = len(objects.get(wish["class"], ())) - wish["count"] + 1
        shares.append(min(1.0, max(0.0, 1 - over / wish["count"])))
    return shares


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box `a` is seen from box `b`: none, one or two of RELATIONS."""
    first, second = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))
    offset = first.mean(axis=0) - second.mean(axis=0)
    sizes = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
    beyond = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    places = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in places.items() if holds}
