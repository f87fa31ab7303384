"""What only a look into the steps shows, in a real ComfyUI: the bar of an update, and scoring beside drawing."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfy_server import run_script, why_not

INSIDE = Path(__file__).parent / "inside"


def test_the_bar_of_an_update_has_a_step_for_all_that_it_does() -> None:
    if why_not():
        pytest.skip(why_not())
    bars = run_script(INSIDE / "comfy_progress.py", timeout=600)
    assert bars.pop("equal, no KL term") == [1, 0]  # nothing to do
    assert len(bars) == 14
    assert {kind: steps for kind, (steps, _) in bars.items()} == {kind: taken for kind, (_, taken) in bars.items()}


def test_the_loop_has_a_server_score_a_group_while_the_next_is_drawn_with_the_same_scores_and_key() -> None:
    if why_not():
        pytest.skip(why_not())
    seen = run_script(INSIDE / "comfy_overlap.py", timeout=600)
    assert seen["beside"]
    assert seen["ticks"] >= 4
    together, apart = seen["scores"]
    assert together == apart
    assert len({score for group in together for score in group}) > 1
    assert len(set(seen["keys"])) == 1
