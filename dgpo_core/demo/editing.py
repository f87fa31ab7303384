"""The shapes world, edited: a scene, what is asked to be done to it, and what it is then.

What is not asked for stays: the ground, and every other object's place, size and shade. Everything is a pure function
of a `random.Random`.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dgpo_core.demo import world
from dgpo_core.demo.world import COLOURS, MIDDLE, OPPOSITE, PAIRS, SHAPES, Drawing, Placed

KINDS = ("recolour", "reshape", "remove", "swap")
WEIGHTS = (3, 3, 2, 2)
"""How often each kind is drawn."""


@dataclass(frozen=True)
class Edit:
    """An instruction, and the objects before and after it.

    Objects that are in both have the same place in both lists. relation: of the first to the second, after it.
    """

    kind: str
    text: str
    before: tuple[Placed, ...]
    after: tuple[Placed, ...]
    relation: str | None = None

    def metadata(self) -> dict[str, Any]:
        """What the picture must show now, as a `Scene` has it."""
        include = [{"shape": thing.shape, "color": thing.color, "count": 1} for thing in self.after]
        return {"tag": self.kind, "include": include, "relation": self.relation}


Source = tuple[tuple[Placed, ...], str | None]
"""Objects, and how the first stands to the second."""


def source(rng: random.Random) -> Source:
    """One object, or two of different colours and shapes in some relation: a caption tells them apart."""
    things = list(zip(rng.sample(list(COLOURS), 2), rng.sample(SHAPES, 2), strict=True))
    relation = rng.choice(list(PAIRS)) if rng.random() < 0.75 else None
    places = PAIRS[relation] if relation else ((MIDDLE, MIDDLE),)
    at = [tuple(middle + rng.uniform(-world.JITTER, world.JITTER) for middle in place) for place in places]
    placed = (
        Placed(shape, color, x, y, rng.uniform(*world.RADIUS))
        for (color, shape), (x, y) in zip(things, at, strict=False)
    )
    return tuple(placed), relation


def sample(before: tuple[Placed, ...], relation: str | None, rng: random.Random) -> Edit:
    """Something to do to these objects."""
    kinds = KINDS if len(before) == 2 else KINDS[:2]
    kind = rng.choices(kinds, WEIGHTS[: len(kinds)])[0]
    return _EDITS[kind](before, relation, rng)


def draw(edit: Edit, rng: random.Random) -> tuple[Drawing, Drawing]:
    """The pictures before and after, on the same ground and in the same shades."""
    seed = rng.getrandbits(32)
    before, after = (world.draw(list(objects), random.Random(seed)) for objects in (edit.before, edit.after))
    return before, after


def _called(thing: Placed) -> str:
    return f"the {thing.color} {thing.shape}"


def _with(before: tuple[Placed, ...], i: int, thing: Placed) -> tuple[Placed, ...]:
    return (*before[:i], thing, *before[i + 1 :])


def _recolour(before: tuple[Placed, ...], relation: str | None, rng: random.Random) -> Edit:
    i = rng.randrange(len(before))
    color = rng.choice([name for name in COLOURS if name not in {thing.color for thing in before}])
    text = f"make {_called(before[i])} {color}"
    return Edit("recolour", text, before, _with(before, i, replace(before[i], color=color)), relation)


def _reshape(before: tuple[Placed, ...], relation: str | None, rng: random.Random) -> Edit:
    i = rng.randrange(len(before))
    shape = rng.choice([name for name in SHAPES if name not in {thing.shape for thing in before}])
    text = f"turn {_called(before[i])} into a {shape}"
    return Edit("reshape", text, before, _with(before, i, replace(before[i], shape=shape)), relation)


def _remove(before: tuple[Placed, ...], relation: str | None, rng: random.Random) -> Edit:
    i = rng.randrange(2)
    kept, gone = before[1 - i], before[i]
    return Edit("remove", f"remove {_called(gone)}", (kept, gone), (kept,))


def _swap(before: tuple[Placed, ...], relation: str | None, rng: random.Random) -> Edit:
    a, b = before
    after = (replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y))
    first, second = rng.sample(before, 2)
    text = f"swap {_called(first)} and {_called(second)}"
    return Edit("swap", text, before, after, OPPOSITE[relation] if relation else None)


_EDITS: Mapping[str, Callable[[tuple[Placed, ...], str | None, random.Random], Edit]] = {
    "recolour": _recolour,
    "reshape": _reshape,
    "remove": _remove,
    "swap": _swap,
}
