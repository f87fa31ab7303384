"""The shapes world: scenes of coloured shapes, their captions, and their pictures.

It is a miniature of GenEval (arXiv 2310.11513): single object, two objects, counting, colour attribution and position,
on 64 x 64 images. Everything is a pure function of a `random.Random`, so data and prompt lists can be made again.
"""

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels per side
SUPERSAMPLE = 4
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 220),
    "yellow": (240, 200, 30),
    "purple": (150, 50, 190),
}
SHAPES = ("circle", "square", "triangle")
COUNTS = {2: "two", 3: "three"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE)
CATEGORIES = ("single_object", "two_object", "counting", "color_attr", "position")
BACKGROUND = (232, 246)  # grey level, drawn uniformly
RADIUS = (8.5, 10.5)  # pixels
JITTER = 2.5  # how far an object may stand from its place in the layout, along x and along y, pixels
LOW, MIDDLE, HIGH = 17.0, 32.0, 47.0  # the places of a layout, pixels from the left or the top
PAIRS: Mapping[str, tuple[tuple[float, float], ...]] = {  # the first object's place, then the second's
    "left of": ((LOW, MIDDLE), (HIGH, MIDDLE)),
    "right of": ((HIGH, MIDDLE), (LOW, MIDDLE)),
    "above": ((MIDDLE, LOW), (MIDDLE, HIGH)),
    "below": ((MIDDLE, HIGH), (MIDDLE, LOW)),
}
TRIPLE = ((MIDDLE, LOW), (LOW, HIGH), (HIGH, HIGH))


@dataclass(frozen=True)
class Thing:
    """`count` equal objects. `color` None means any colour (the prompt does not say)."""

    shape: str
    color: str | None = None
    count: int = 1

    def text(self) -> str:
        words = [COUNTS.get(self.count, "a"), self.color, self.shape + ("s" if self.count > 1 else "")]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: one or two things, and how the first stands to the second."""

    category: str
    things: tuple[Thing, ...]
    relation: str | None = None

    def prompt(self) -> str:
        joint = f" {self.relation} " if self.relation else " and "
        return joint.join(thing.text() for thing in self.things)

    def metadata(self) -> dict[str, Any]:
        """GenEval-style metadata: `tag`, `include` and, for positions, `relation` (of the first to the second)."""
        include = [{"shape": t.shape, "color": t.color, "count": t.count} for t in self.things]
        return {"tag": self.category, "include": include, "relation": self.relation}

    def meaning(self) -> tuple[Any, ...]:
        """Equal for two prompts that ask for the same picture, e.g. "A left of B" and "B right of A"."""
        things = [(t.shape, t.color or "", t.count) for t in self.things]
        if self.relation is None:
            return (self.category, None, *sorted(things))
        mirrored = (OPPOSITE[self.relation], *reversed(things))
        return (self.category, *min((self.relation, *things), mirrored))


def all_scenes() -> Iterator[Scene]:
    """Every prompt of the world, once."""
    kinds = [Thing(shape, color) for color in COLOURS for shape in SHAPES]
    for kind in kinds:
        yield Scene("single_object", (kind,))
        for count in COUNTS:
            yield Scene("counting", (replace(kind, count=count),))
    for one, other in itertools.permutations(SHAPES, 2):
        yield Scene("two_object", (Thing(one), Thing(other)))
    for a, b in itertools.permutations(kinds, 2):
        yield Scene("color_attr", (a, b))
        for relation in RELATIONS:
            yield Scene("position", (a, b), relation)


@dataclass(frozen=True)
class Placed:
    """One drawn object: centre and radius in pixels, x to the right and y down."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def holds(relation: str, ax: float, ay: float, bx: float, by: float, margin: float) -> bool:
    """Whether a stands in `relation` to b by more than `margin` pixels (y grows downwards).

    The relation's axis must be the longer one, so that at most one of the four relations holds.
    """
    dx, dy = bx - ax, by - ay
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > margin and along > abs(across)


def place(scene: Scene, rng: random.Random) -> list[Placed]:
    """A position for every object of the scene, about its place in the layout.

    One stands in the middle, two in the asked relation or else side by side as they are named, three in a triangle.
    """
    wanted = [(t.shape, t.color or rng.choice(list(COLOURS))) for t in scene.things for _ in range(t.count)]
    layout = {1: ((MIDDLE, MIDDLE),), 2: PAIRS[scene.relation or "left of"], 3: TRIPLE}[len(wanted)]
    return [
        Placed(shape, color, x + rng.uniform(-JITTER, JITTER), y + rng.uniform(-JITTER, JITTER), rng.uniform(*RADIUS))
        for (shape, color), (x, y) in zip(wanted, layout, strict=True)
    ]


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corner points of the shape (a circle is a 48-gon)."""
    if shape == "circle":
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return [(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles]
    if shape == "square":
        half = 0.85 * radius
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    return [(x, y - radius), (x + radius, y + 0.85 * radius), (x - radius, y + 0.85 * radius)]


def mask(thing: Placed) -> np.ndarray:
    """How much of each pixel the object covers, float32 [SIZE, SIZE] in [0, 1]."""
    canvas = Image.new("L", (SIZE * SUPERSAMPLE,) * 2)
    points = [(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in outline(thing.shape, thing.x, thing.y, thing.radius)]
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32) / 255.0


@dataclass(frozen=True, eq=False)
class Drawing:
    """A picture, uint8 [SIZE, SIZE, 3], with what was drawn on which grey (0 to 255), and the objects' masks."""

    picture: np.ndarray
    grey: int
    objects: tuple[Placed, ...]
    masks: tuple[np.ndarray, ...]


def draw(objects: list[Placed], rng: random.Random) -> Drawing:
    """The objects on a light grey ground, anti-aliased, their colours a little off the palette's."""
    grey = rng.randint(*BACKGROUND)
    canvas = np.full((SIZE, SIZE, 3), grey, dtype=np.float32)
    masks = tuple(mask(thing) for thing in objects)
    for thing, covered in zip(objects, masks, strict=True):
        color = [min(255, max(0, c + rng.randint(-12, 12))) for c in COLOURS[thing.color]]
        canvas += covered[:, :, None] * (np.array(color, dtype=np.float32) - grey)
    return Drawing(canvas.round().astype(np.uint8), grey, tuple(objects), masks)


def sample_scene(rng: random.Random, scenes: Mapping[str, list[Scene]]) -> Scene:
    """A scene with its category drawn first, so that rare categories are seen as often as common ones."""
    return rng.choice(scenes[rng.choices(CATEGORIES, weights=(1, 1, 2, 2, 3))[0]])


def by_category() -> dict[str, list[Scene]]:
    """All scenes of the world, by category."""
    table: dict[str, list[Scene]] = {category: [] for category in CATEGORIES}
    for scene in all_scenes():
        table[scene.category].append(scene)
    return table


def mislabel(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one fact changed: what a careless caption writer would have put down."""
    things = list(scene.things)
    i = rng.randrange(len(things))
    thing = things[i]
    faults = ["shape", "color", "relation", "count"]
    rng.shuffle(faults)
    for fault in faults:
        if fault == "relation" and scene.relation:
            return replace(scene, relation=rng.choice([r for r in RELATIONS if r != scene.relation]))
        if fault == "color" and thing.color:
            thing = replace(thing, color=rng.choice([c for c in COLOURS if c != thing.color]))
        elif fault == "shape":
            thing = replace(thing, shape=rng.choice([s for s in SHAPES if s != thing.shape]))
        elif fault == "count" and scene.category in ("counting", "single_object"):
            thing = replace(thing, count=rng.choice([n for n in (1, *COUNTS) if n != thing.count]))
        else:
            continue
        things[i] = thing
        return replace(scene, things=tuple(things))
    return scene
