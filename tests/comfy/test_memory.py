"""What the nodes do when the accelerator's memory runs out, in a real ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comfy_server import run_script, why_not

SCRIPT = Path(__file__).parent / "inside" / "comfy_memory.py"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `comfy_memory.py` saw: batches of forwards, where two samples fit."""
    if why_not():
        pytest.skip(why_not())
    return run_script(SCRIPT, timeout=300)


def test_a_batch_that_does_not_fit_is_halved(found: dict[str, Any]) -> None:
    assert found["first"]["draw"] == [4, 2, 2]
    assert found["first"]["learn"][0] == 4
    assert set(found["first"]["learn"][1:]) == {2}


def test_the_steps_after_it_begin_with_the_batch_that_fitted(found: dict[str, Any]) -> None:
    assert found["again"]["draw"] == found["again"]["compare"] == [2, 2]
    assert set(found["again"]["learn"]) == {2}


def test_the_comparison_has_room_too(found: dict[str, Any]) -> None:
    assert found["compare"] == [4, 2, 2]
