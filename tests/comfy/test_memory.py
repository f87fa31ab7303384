"""What the nodes do when the accelerator's memory runs out, in a real ComfyUI."""

from __future__ import annotations

from typing import Any

from comfy_fixtures import seen_by

found = seen_by("comfy_memory.py", timeout=300)
"""What it saw: batches of forwards, where two samples fit."""


def test_a_batch_that_does_not_fit_is_halved(found: dict[str, Any]) -> None:
    assert found["first"]["draw"] == [4, 2, 2]
    assert found["first"]["learn"][0] == 4
    assert set(found["first"]["learn"][1:]) == {2}


def test_the_steps_after_it_begin_with_the_batch_that_fitted(found: dict[str, Any]) -> None:
    assert found["again"]["draw"] == found["again"]["compare"] == [2, 2]
    assert set(found["again"]["learn"]) == {2}


def test_the_comparison_has_room_too(found: dict[str, Any]) -> None:
    assert found["compare"] == [4, 2, 2]
