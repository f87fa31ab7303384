"""GenEval's rules: from what a detector found in a picture to what is right in it. Pure functions.

Two judgements, which differ: `correct` is what GenEval reports, `training_score` what DGPO's authors train on.
Source: https://github.com/djghosh13/geneval, evaluation/evaluate_images.py (MIT), https://arxiv.org/abs/2310.11513.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown

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


def check_metadata(prompt: str, metadata: Mapping[str, Any], classes: Collection[str]) -> None:
    """Raises UserError, naming the prompt, for metadata that is not GenEval's or asks for an unknown class.

    metadata: {"tag": one of TAGS, "include": [{"class": ..., "count": 1, ...}, ...], "exclude": [...]}; an object of
    "include" may have a "color", and a "position": [relation, number of an earlier object]; "exclude" may be left out.
    """
    problem = _problem(metadata, classes)
    if problem:
        raise UserError(f"GenEval cannot judge the prompt {shown(repr(prompt))}: {shown(problem)}.")


def _problem(metadata: Mapping[str, Any], classes: Collection[str]) -> str:
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


def correct(objects: Mapping[str, Sequence[Detection]], metadata: Mapping[str, Any], colors_of: ColorsOf) -> bool:
    """Whether GenEval calls the picture "correct", which is what it reports the share of.

    Of each class of "include" at least its count must be there, and of each of "exclude" fewer than its count. Only the
    `count` best detections are looked at: all must have the colour, and stand as asked to all of the earlier object.
    """
    groups: list[Sequence[Detection]] = []
    for wish in metadata["include"]:
        found = objects.get(wish["class"], ())[: wish["count"]]
        groups.append(found)
        if len(found) < wish["count"]:
            return False
        if "color" in wish and list(colors_of(found, wish["class"])).count(wish["color"]) < wish["count"]:
            return False
        if "position" in wish and not _stand(found, groups, wish["position"]):
            return False
    return all(len(objects.get(wish["class"], ())) < wish["count"] for wish in metadata.get("exclude", ()))


def training_score(
    objects: Mapping[str, Sequence[Detection]], metadata: Mapping[str, Any], colors_of: ColorsOf
) -> float:
    """What DGPO's authors train on: the mean of what each object of "include" earns. At most 1; "exclude" is not read.

    An object of which `count` are asked and n found earns 1 - |n - count| / count, so that too many cost as much as too
    few, without a floor. If a colour or a position is asked for and n is not `count`, it also earns a 0. Where n is
    `count`, it earns the share of them that has the colour. Where also all have it, it earns for its position: 1 if all
    stand so; 0 if the earlier object is not as asked; both a 0 and a 1 if they stand otherwise. (That 1 looks like an
    oversight, but it is what their results were trained on; it makes a wrong position cost a half.)
    Source: https://github.com/Luo-Yihong/DGPO, flow_grpo/gen_eval.py: the "score".
    """
    earned: list[float] = []
    fulfilled: list[Sequence[Detection]] = []  # the objects of each wish; none where it is not as asked
    for wish in metadata["include"]:
        found = objects.get(wish["class"], ())
        own = [_share(len(found), wish["count"])]
        if own == [1]:
            if "color" in wish:
                own.append(_share(list(colors_of(found, wish["class"])).count(wish["color"]), wish["count"]))
            if "position" in wish and own[-1] == 1:
                own += _earned_by_position(found, fulfilled, wish["position"])
        elif "color" in wish or "position" in wish:
            own.append(0.0)
        earned += own
        fulfilled.append(found if all(part == 1 for part in own) else ())
    return sum(earned) / len(earned)


def _share(found: int, count: int) -> float:
    return 1 - abs(found - count) / count


def _earned_by_position(
    found: Sequence[Detection], fulfilled: Sequence[Sequence[Detection]], position: Sequence[Any]
) -> list[float]:
    if not fulfilled[position[1]]:
        return [0.0]
    return [1.0] if _stand(found, fulfilled, position) else [0.0, 1.0]


def _stand(found: Sequence[Detection], groups: Sequence[Sequence[Detection]], position: Sequence[Any]) -> bool:
    relation, target = position
    return all(relation in relations(a.box, b.box) for a in found for b in groups[target])


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
