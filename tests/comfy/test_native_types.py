"""The native policy on weights that ComfyUI keeps in other ways: types of fewer bits, loaded in part, in pages."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_fixtures import seen_by
from comfy_server import REPO

TOLERANCE = 1e-5
"""Of predictions and gradients, as a share of the largest value: float32 sums in another order. 2e-6 was measured."""
KINDS = ("bfloat16", "float8_e4m3fn", "scaled_fp8")
PLACES = ("sd15", "flux", "qwen", "hidream", "wan")


found = seen_by("comfy_native_types.py", timeout=900)


def assert_exact(case: dict[str, Any]) -> None:
    """Predictions and gradients are plain autograd's, with and without checkpointing; nothing of the base is kept."""
    assert case["prediction"] < TOLERANCE
    assert case["gradient"] < TOLERANCE
    assert max(case["checkpointed"]) < TOLERANCE
    assert case["saved"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen", "hidream", "wan"])
def test_gradients_on_fewer_bits_are_those_on_the_numbers_they_stand_for(
    found: dict[str, Any], family: str, kind: str
) -> None:
    case = found["types"][f"{family} {kind}"]
    assert_exact(case)
    assert case["scaled"] == (kind == "scaled_fp8")
    assert case["restored"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen", "hidream", "wan"])
def test_the_forward_is_the_untouched_bases_to_the_bit(found: dict[str, Any], family: str, kind: str) -> None:
    assert found["types"][f"{family} {kind}"]["same_forward"]


def test_products_in_fp8_have_the_backward_that_comfyui_gives_them(found: dict[str, Any]) -> None:
    case = found["fp8 products"]["qwen"]
    if case is None:
        pytest.skip("this ComfyUI has no such products on a CPU")
    assert_exact(case)
    assert case["rounding"] > 1000 * TOLERANCE  # it is another forward


@pytest.mark.parametrize("family", PLACES)
def test_a_model_that_is_loaded_in_part_trains_the_same_with_the_users_lora_on_it(
    found: dict[str, Any], family: str
) -> None:
    case = found["partly"][family]
    assert_exact(case)
    assert min(case["cast"], case["patched_on_the_fly"], case["loaded"]) > 4  # of each kind some
    assert case["restored"]


def test_scaled_fp8_that_is_patched_where_it_is_used_trains_the_same(found: dict[str, Any]) -> None:
    assert_exact(found["partly"]["scaled_fp8"])


def test_memory_is_reserved_for_the_backward_too_and_only_when_more_is_needed(found: dict[str, Any]) -> None:
    case = found["reserving"]
    assert case["forward"] == pytest.approx([2])
    assert case["smaller"] == []
    assert case["training"] == pytest.approx([2 * (6 + 3)])  # three blocks
    assert case["again"] == []
    assert case["more"] == pytest.approx([3 * (6 + 3)])
    assert case["checkpointed"] == pytest.approx([2 * 6])


def test_activations_are_recomputed_from_the_step_on_that_ran_out_of_memory(found: dict[str, Any]) -> None:
    assert found["recomputing"] == {"at first": 0, "on": 3, "off": 0}  # three blocks


counted = seen_by("comfy_native_reserve.py", timeout=900)


def test_what_is_reserved_is_what_full_size_models_keep(counted: dict[str, Any]) -> None:
    assert set(counted) >= {"SDXL", "Flux", "Qwen-Image", "Wan 2.1 1.3B"}
    for name, case in counted.items():
        plain, checkpointed = case["reserved"]
        assert case["checkpointed"] + 1 < checkpointed, name  # the gradients on their way down are one unit
        if not name.startswith("Wan"):  # of which ComfyUI thinks in films; its page advises checkpointing
            assert case["plain"] < plain, name
            assert case["plain"] > plain / 3, name  # nor is it far too much


def test_what_is_counted_for_full_size_models_is_what_they_keep_and_little_more(counted: dict[str, Any]) -> None:
    for name, case in counted.items():
        kept, recomputed = case["counted"]
        assert case["plain"] < kept < 1.15 * case["plain"], name
        assert 0.95 * case["checkpointed"] < recomputed < case["checkpointed"] + 1, name  # gradients on their way down


@pytest.mark.parametrize("family", PLACES)
def test_weights_may_be_gone_as_soon_as_they_were_used(found: dict[str, Any], family: str) -> None:
    case = found["paged"][family]
    if case is None:
        pytest.skip("this ComfyUI keeps no weights in pages")
    assert_exact(case)  # anything kept would have turned into NaN
    assert case["not_given_back"] == []
    assert case["restored"]


rounding = seen_by("comfy_native_rounding.py", timeout=300)


def test_the_help_page_says_what_rounding_costs_a_lora(rounding: dict[str, Any]) -> None:
    page = REPO / "nodes" / "web" / "docs" / "DGPO_NativePolicy.md"
    lines = page.read_text().split("| how much the LoRA changes a prediction")[1].splitlines()[2:5]
    for number, line in enumerate(lines):
        effect, *errors = (float(part.strip(" %")) / 100 for part in line.strip("|").split("|"))
        for kind, error in zip(KINDS, errors, strict=True):
            row = rounding[kind][number]
            assert row["effect"] == pytest.approx(effect, rel=0.1)
            assert row["loaded"] == pytest.approx(error, rel=0.1)  # fp8 is rounded by chance
    assert max(row["loaded"] for row in rounding["float32"]) < 1e-3
    assert max(row["where_used"] for kind in KINDS[:2] for row in rounding[kind]) < 1e-3
