"""A native policy on Wan 2.2 5B in a real ComfyUI, whose latents are smaller and have more channels than Wan 2.1's."""

from __future__ import annotations

from typing import Any

from comfy_families import MODULES, TOLERANCE
from comfy_fixtures import seen_by

found = seen_by("comfy_native_wan22.py", timeout=300)


def test_single_frames_are_drawn_as_ksampler_draws_them(found: dict[str, Any]) -> None:
    assert found["same"]
    assert found["pictures"] == [1, 3, 256, 256]


def test_gradients_are_those_of_plain_autograd(found: dict[str, Any]) -> None:
    assert found["prediction"] < TOLERANCE
    assert found["gradient"] < TOLERANCE
    assert found["saved"] == 0
    assert found["reached"] == 2 * MODULES["wan"]
