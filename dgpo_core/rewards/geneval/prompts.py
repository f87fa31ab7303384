"""Prompts for the rewards of GenEval, with their facts: its six tasks over COCO's objects, in words of its kind.

Source: https://arxiv.org/abs/2310.11513, section 3 (the tasks, and what each may ask for).
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.rewards.geneval.rules import COLORS, RELATIONS, check_metadata

# fmt: off
OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
"""COCO's classes, as GenEval calls them."""

SHARES = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 1}
"""How many prompts of each task there are to one of another, as in Flow-GRPO's training set (arXiv 2505.05470), which
has no single objects."""

NUMBERS = {2: "two", 3: "three", 4: "four"}
PAIRS = {"skis": "pair of skis", "scissors": "pair of scissors"}
PLURALS = {
    "person": "people",
    "sheep": "sheep",
    "knife": "knives",
    "computer mouse": "computer mice",
    "skis": "pairs of skis",
    "scissors": "pairs of scissors",
}
_Names = tuple[str, ...]  # of objects, or of their colours
_Asked = tuple[int, _Names, str]  # count, colours, and relation
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """`count` objects of a class; any colour where none is given."""

    name: str
    count: int = 1
    color: str = ""

    def text(self) -> str:
        if self.count > 1:
            return f"{NUMBERS[self.count]} {plural(self.name)}"
        words = f"{self.color} {PAIRS.get(self.name, self.name)}".strip()
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    def metadata(self) -> dict[str, Any]:
        return {"class": self.name, "count": self.count, **({"color": self.color} if self.color else {})}


def plural(name: str) -> str:
    """Of a class."""
    return PLURALS.get(name) or name + ("es" if name.endswith(("s", "sh", "ch")) else "s")


def draw(count: int, rng: random.Random, free: Callable[[Prompt], bool]) -> list[Prompt]:
    """`count` different prompts that are `free`, the tasks in the proportions of SHARES as long as each has some left.

    There are 294,200, but 240 of counting: with more than 850 prompts in all, other tasks take its place.
    Raises UserError where there are fewer than `count`.
    """
    piles = {task: filter(free, _shuffled(task, rng)) for task in SHARES}
    chosen: list[Prompt] = []
    taken: Counter[str] = Counter()
    while piles and len(chosen) < count:
        task = min(piles, key=lambda name: (taken[name] + 1) / SHARES[name])
        prompt = next(piles[task], None)
        if prompt is None:
            del piles[task]
        else:
            chosen.append(prompt)
            taken[task] += 1
    if len(chosen) < count:
        raise UserError(
            f"There are only {len(chosen):,} different prompts to choose from, not {count:,}: ask for fewer."
        )
    rng.shuffle(chosen)
    return chosen


def _shuffled(task: str, rng: random.Random) -> Iterator[Prompt]:
    """All prompts of a task, in a random order, each in one of its two wordings."""
    subjects, asked = _choices(task)
    for place in _permutation(len(subjects) * len(asked), rng):
        names, (count, colors, relation) = subjects[place // len(asked)], asked[place % len(asked)]
        things = tuple(Thing(name, count, color) for name, color in zip(names, colors, strict=True))
        yield _prompt(task, *((things, relation) if rng.random() < 0.5 else _turned(things, relation)))


def _permutation(n: int, rng: random.Random) -> Iterator[int]:
    """0 to n - 1 in a random order: Fisher and Yates's shuffle, as far as it is looked at."""
    moved: dict[int, int] = {}
    for i in range(n):
        j = rng.randrange(i, n)
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)


def _choices(task: str) -> tuple[list[_Names], list[_Asked]]:
    """The objects of a task, and what it asks for of them: count, colours, relation of the first to the second.

    Each of the first goes with each of the second; no two mean the same.
    """
    any_one: list[_Names] = [(name,) for name in OBJECTS]
    any_two: list[_Names] = list(itertools.combinations(OBJECTS, 2))
    one, two = ([names for names in some if "person" not in names] for some in (any_one, any_two))  # to be coloured
    choices: dict[str, tuple[list[_Names], list[_Asked]]] = {
        "single_object": (any_one, [(1, ("",), "")]),
        "two_object": (any_two, [(1, ("", ""), "")]),
        "counting": (any_one, [(count, ("",), "") for count in NUMBERS]),
        "colors": (one, [(1, (color,), "") for color in COLORS]),
        "color_attr": (two, [(1, colors, "") for colors in itertools.permutations(COLORS, 2)]),
        "position": (any_two, [(1, ("", ""), relation) for relation in RELATIONS]),
    }
    return choices[task]


def _turned(things: tuple[Thing, ...], relation: str) -> tuple[tuple[Thing, ...], str]:
    """The same in other words."""
    return things[::-1], OPPOSITE.get(relation, "")


def _prompt(task: str, things: tuple[Thing, ...], relation: str) -> Prompt:
    text = f" {relation or 'and'} ".join(thing.text() for thing in things)
    include = [thing.metadata() for thing in things]
    if relation:  # the facts begin with the object that the other one stands beside
        include = [include[1], {**include[0], "position": [relation, 0]}]
    facts: dict[str, Any] = {"tag": task, "include": include}
    if task == "counting":
        facts["exclude"] = [{"class": things[0].name, "count": things[0].count + 1}]
    return Prompt(f"a photo of {text}", facts)


def meaning(prompt: Prompt) -> Hashable:
    """Equal for prompts that ask for the same: "a dog and a cat" and "a cat and a dog", "A above B" and "B below A".

    None where the prompt's facts are not GenEval's.
    """
    classes = [str(wish.get("class")) for wish in _wishes(prompt.metadata)]
    try:
        check_metadata(prompt.text, prompt.metadata, classes)
    except UserError:
        return None
    wishes = prompt.metadata["include"]
    things = [(str(wish["class"]), wish["count"], wish.get("color", "")) for wish in wishes]
    places = [_place(n, wish["position"], things) for n, wish in enumerate(wishes) if "position" in wish]
    return frozenset(Counter(things).items()), frozenset(places)


def _wishes(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    lists = [value for value in (metadata.get("include"), metadata.get("exclude")) if isinstance(value, list)]
    return [wish for wish in itertools.chain(*lists) if isinstance(wish, Mapping)]


def _place(n: int, position: tuple[str, int], things: list[tuple[Any, ...]]) -> Hashable:
    relation, target = position
    return min((things[n], relation, things[target]), (things[target], OPPOSITE[relation], things[n]))
