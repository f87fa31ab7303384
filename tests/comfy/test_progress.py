"""The bar on DGPO LoRA Trainer is full when the update is done, whatever it compares with, in a real ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfy_server import run_script, why_not

SCRIPT = Path(__file__).parent / "inside" / "comfy_progress.py"


def test_the_bar_of_an_update_has_a_step_for_all_that_it_does() -> None:
    if why_not():
        pytest.skip(why_not())
    bars = run_script(SCRIPT, timeout=600)
    assert bars.pop("equal, no KL term") == [1, 0]  # nothing to do
    assert len(bars) == 14
    assert {kind: steps for kind, (steps, _) in bars.items()} == {kind: taken for kind, (_, taken) in bars.items()}
