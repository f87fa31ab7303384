"""Native training in a real ComfyUI keeps nothing of an iteration that is over."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfy_server import run_script, why_not

SCRIPT = Path(__file__).parent / "inside" / "comfy_native_memory.py"
NOISE = 16 * 2**20
"""Bytes by which a process may grow without keeping anything: the allocator's. An iteration's images and latents alone,
kept 40 times, would be 33 MB."""


def test_memory_does_not_grow_over_50_iterations_between_ordinary_pictures() -> None:
    if why_not():
        pytest.skip(why_not())
    found = run_script(SCRIPT, timeout=900)
    warm, end = found["warm"], found["end"]
    assert found["step"] == 50
    assert end["tensors"] == warm["tensors"]
    assert end["bytes"] == warm["bytes"]
    assert end["models"] <= warm["models"]
    assert end["process"] < warm["process"] + NOISE
