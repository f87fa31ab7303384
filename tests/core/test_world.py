"""The demo's prompts: disjoint in meaning, true to their metadata, and made again from a seed."""

import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dgpo_core.common.prompts import Prompt, load_prompts
from dgpo_core.demo import world
from dgpo_core.demo.build import BuildConfig, write_prompts
from dgpo_core.demo.world import Scene, Thing
from dgpo_core.settings.shipped import DEMO

TRAIN, HELD_OUT = load_prompts(DEMO / "train.jsonl"), load_prompts(DEMO / "held_out.jsonl")


def scene_of(metadata: Mapping[str, Any]) -> Scene:
    """The scene that a prompt's metadata describe."""
    things = tuple(Thing(e["shape"], e["color"], e["count"]) for e in metadata["include"])
    return Scene(metadata["tag"], things, metadata["relation"])


def test_the_metadata_say_what_the_prompt_says() -> None:
    for prompt in [*TRAIN, *HELD_OUT]:
        scene = scene_of(prompt.metadata)
        assert scene.prompt() == prompt.text
        assert scene.metadata() == prompt.metadata


def test_no_held_out_prompt_asks_for_what_was_trained() -> None:
    trained = {scene_of(prompt.metadata).meaning() for prompt in TRAIN}
    held_out = {scene_of(prompt.metadata).meaning() for prompt in HELD_OUT}
    assert not trained & held_out
    assert len(trained) == len(TRAIN)
    assert len(held_out) == len(HELD_OUT)


def test_both_lists_have_every_category() -> None:
    for prompts in (TRAIN, HELD_OUT):
        assert {prompt.metadata["tag"] for prompt in prompts} == set(world.CATEGORIES)


def test_every_colour_and_shape_of_the_held_out_prompts_was_trained() -> None:
    def words(prompts: list[Prompt]) -> set[str]:
        return set(" ".join(prompt.text for prompt in prompts).split())

    assert words(HELD_OUT) <= words(TRAIN)


def test_the_lists_are_those_that_the_build_command_writes(tmp_path: Path) -> None:
    write_prompts(tmp_path, BuildConfig().seed)
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()


def test_mirrored_relations_and_swapped_colours_mean_the_same() -> None:
    a, b = Thing("circle", "red"), Thing("square", "blue")
    left, right = Scene("position", (a, b), "left of"), Scene("position", (b, a), "right of")
    assert left.meaning() == right.meaning()
    assert left.meaning() != Scene("position", (b, a), "left of").meaning()
    assert Scene("color_attr", (a, b)).meaning() == Scene("color_attr", (b, a)).meaning()


def test_a_world_is_a_pure_function_of_its_seed() -> None:
    def pictures(seed: int) -> list[np.ndarray]:
        rng, scenes = random.Random(seed), world.by_category()
        shown = [world.sample_scene(rng, scenes) for _ in range(5)]
        return [world.draw(world.place(scene, rng), rng).picture for scene in shown]

    assert all(np.array_equal(a, b) for a, b in zip(pictures(1), pictures(1), strict=True))
    assert not np.array_equal(pictures(1)[0], pictures(2)[0])


def test_objects_lie_inside_the_picture_apart_and_as_asked() -> None:
    rng, scenes = random.Random(3), world.by_category()
    for _ in range(200):
        scene = world.sample_scene(rng, scenes)
        objects = world.place(scene, rng)
        assert len(objects) == sum(thing.count for thing in scene.things)
        for o in objects:
            assert o.radius <= min(o.x, o.y, world.SIZE - o.x, world.SIZE - o.y)
        for a, b in itertools.combinations(objects, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
        if scene.relation:
            a, b = objects
            true = {r for r in world.RELATIONS if world.holds(r, a.x, a.y, b.x, b.y, 0.0)}
            assert true == {scene.relation}  # and no other one


def test_a_mislabelled_scene_is_another_one_in_one_fact() -> None:
    rng, scenes = random.Random(4), world.by_category()
    for _ in range(300):
        scene = world.sample_scene(rng, scenes)
        wrong = world.mislabel(scene, rng)
        assert wrong.prompt() != scene.prompt()
        facts = [
            (a, b)
            for one, other in zip(scene.things, wrong.things, strict=True)
            for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
        ]
        assert sum(a != b for a, b in [*facts, (scene.relation, wrong.relation)]) == 1
