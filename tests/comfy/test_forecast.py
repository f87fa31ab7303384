"""What a training needs and takes is told before its first forward, in a real ComfyUI; no GPU is there."""

from __future__ import annotations

import re
from typing import Any

import pytest
from comfy_fixtures import seen_by

found = seen_by("comfy_forecast.py", timeout=300)


def test_memory_time_and_the_end_are_told_in_one_sentence(found: dict[str, Any]) -> None:
    assert re.fullmatch(r"needs about 0\.\d of 12 GB, \d+\.\d s an iteration, done at \d\d:\d\d", found["card"])


def test_of_a_single_step_no_end_is_told_and_of_an_unknown_card_no_time(found: dict[str, Any]) -> None:
    assert found["card"].startswith(found["step"])
    assert "done" not in found["step"]
    assert re.fullmatch(r"needs about 0\.\d of 12 GB", found["unknown"])


def test_what_does_not_fit_says_how_much_is_missing(found: dict[str, Any]) -> None:
    assert "GiB are missing" in found["small"]


def test_without_a_card_nothing_is_foretold(found: dict[str, Any]) -> None:
    assert found["cpu"] == ""


def test_the_loop_shows_it_before_the_first_forward_and_draws_with_what_was_chosen(found: dict[str, Any]) -> None:
    (before, first), *_ = found["loop"]["texts"]
    assert before == 0
    assert first.startswith("needs about")
    assert found["loop"]["batches"][0] == 8  # all of the round: what is open was chosen, and there is room


@pytest.mark.parametrize("family", ["sd15", "flux", "qwen", "hidream", "wan"])
def test_a_models_network_is_counted_by_its_own_shapes(found: dict[str, Any], family: str) -> None:
    forward, plain = found["native"][family]["plain"]
    _, checkpointed = found["native"][family]["checkpointed"]
    assert 0 < forward < checkpointed < plain


def test_activations_are_recomputed_only_where_a_card_needs_it(found: dict[str, Any]) -> None:
    files, native = found["recomputing"]["files"], found["recomputing"]["native"]
    assert (files["loaded"], files["large"], files["small"]) == (True, False, True)
    assert native == {"large": False, "small": True}


def test_what_had_to_be_turned_on_meanwhile_stays_on(found: dict[str, Any]) -> None:
    assert found["recomputing"]["files"]["stays"]
