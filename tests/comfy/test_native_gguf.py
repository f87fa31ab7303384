"""The native policy on MODELs as ComfyUI-GGUF loads them; with COMFYUI_GGUF, the pack's folder, on its own layers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from comfy_server import run_script, why_not

SCRIPT = Path(__file__).parent / "inside" / "comfy_native_gguf.py"
TOLERANCE = 1e-5
"""Of predictions and gradients, as a share of the largest value: float32 sums in another order. 7e-7 was measured."""
KINDS = ("Q8_0", "Q4_0", "Q5_1")
PACKED = {"qwen": 48, "lumina": 29}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `comfy_native_gguf.py` saw."""
    if why_not():
        pytest.skip(why_not())
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed")
    return run_script(SCRIPT, timeout=900)


def assert_exact(case: dict[str, Any]) -> None:
    """Predictions and gradients are plain autograd's, with and without checkpointing; nothing of the base is kept."""
    assert case["prediction"] < TOLERANCE
    assert case["gradient"] < TOLERANCE
    assert max(case["checkpointed"]) < TOLERANCE
    assert case["saved"] == 0
    assert case["restored"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", PACKED)
def test_gradients_are_those_on_the_numbers_that_the_files_bytes_stand_for(
    found: dict[str, Any], family: str, kind: str
) -> None:
    case = found["trained"][f"{family} {kind}"]
    assert_exact(case)
    assert case["packed"] == PACKED[family]


def test_a_lora_of_the_users_on_the_model_is_part_of_the_base(found: dict[str, Any]) -> None:
    assert_exact(found["patched"])


def test_files_of_one_shape_are_told_apart(found: dict[str, Any]) -> None:
    first, again, other = found["names"]
    assert first == again != other
