"""The shapes world, edited: what is asked for happens, nothing else does, and the embedded editor learns to do it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from dgpo_core import train
from dgpo_core.common.prompts import load_prompts
from dgpo_core.demo import editing
from dgpo_core.demo.build_editor import EditorConfig, main, write_edits
from dgpo_core.demo.verifier import verify
from dgpo_core.demo.world import mask
from dgpo_core.policy import load_policy
from dgpo_core.settings.shipped import DEMO, EDITS, HELD_OUT, TRAINING

pytestmark = pytest.mark.slow


def some(count: int, seed: int = 3) -> list[editing.Edit]:
    rng = random.Random(seed)
    return [editing.sample(*editing.source(rng), rng) for _ in range(count)]


def test_an_edits_outcome_is_right_and_its_source_is_not() -> None:
    rng = random.Random(1)
    for edit in some(100):
        before, after = (drawing.picture / 255.0 for drawing in editing.draw(edit, rng))
        assert verify(after, edit.metadata())[0], edit.text
        assert not verify(before, edit.metadata())[0], edit.text


def test_what_is_not_asked_for_stays_to_the_pixel() -> None:
    rng = random.Random(2)
    for edit in (one for one in some(100) if one.kind != "swap"):
        before, after = (drawing.picture for drawing in editing.draw(edit, rng))
        changed = {*edit.before} ^ {*edit.after}
        away = sum(mask(thing) for thing in changed) == 0
        assert np.array_equal(before[away], after[away]), edit.text


def test_every_kind_is_asked_for_in_both_lists() -> None:
    for file in (TRAINING[EDITS], HELD_OUT[EDITS]):
        assert {prompt.metadata["tag"] for prompt in load_prompts(file)} == set(editing.KINDS)


def test_no_held_out_edit_is_of_a_picture_that_was_trained_on() -> None:
    pictures = [{prompt.sources[0].image().numpy().tobytes() for prompt in load_prompts(f)} for f in
                (TRAINING[EDITS], HELD_OUT[EDITS])]  # fmt: skip
    assert not pictures[0] & pictures[1]


def test_the_lists_are_those_that_the_build_command_writes(tmp_path: Path) -> None:
    write_edits(tmp_path, EditorConfig().seed)
    for name in ("edits.jsonl", "edits_held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()
        for made, kept in zip(load_prompts(tmp_path / name), load_prompts(DEMO / name), strict=True):
            assert made.sources[0].image().equal(kept.sources[0].image())


def test_the_build_command_makes_an_editor(tmp_path: Path) -> None:
    main(EditorConfig(output=tmp_path / "editor", images=8, steps=1, batch=4))
    policy = load_policy(tmp_path / "editor", rank=2, alpha=2.0, dtype="float32")
    assert (policy.family, policy.default_size, policy.sources) == ("kontext", (64, 64), (1, 1))


def test_the_embedded_editor_learns_to_do_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With half of the preset's pictures a round, and larger steps: it was 0.15, then 0.57, of 100 pictures each."""
    monkeypatch.chdir(tmp_path)
    quick = ["--iterations", "12", "--rollout.group_size", "8", "--training.lr", "3e-3"]
    few = ["--evaluation.every", "0", "--evaluation.final_images", "100", "--evaluation.weights", "current"]
    options = [*quick, *few, "--reward", "shapes_graded", "--model.device", "cpu"]
    assert train.main(["--preset", "quickstart-edits", *options]) == 0
    told = json.loads((tmp_path / "runs" / "quickstart-edits" / "summary.json").read_text("utf-8"))
    before, after = (told[which]["mean"] for which in ("base", "adapter"))
    assert 0.05 < before < 0.3
    assert after > before + 0.2
