"""Native policies that edit, in a real ComfyUI: sources are reference latents, and what is drawn is KSampler's."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_fixtures import seen_by

found = seen_by("comfy_native_edit.py", timeout=600)


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_a_source_is_a_reference_latent_and_the_roll_out_ksamplers_bit_for_bit(
    found: dict[str, Any], family: str
) -> None:
    assert found[family]["drawn"]["same"] == [True] * 4  # two prompts, without guidance and with it
    assert found[family]["drawn"]["effect"] > 1e-3


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_training_sees_the_source_and_gradients_come_through(found: dict[str, Any], family: str) -> None:
    case = found[family]["trained"]
    assert case["rows"] == 2  # the negative prompt's conditioning sees the source of its row, too
    assert case["finite"]
    assert case["largest"] > 0
    assert case["same"] < 1e-5  # float32 sums of other rows beside it
    assert case["effect"] > 1e-3


def test_a_text_encoder_that_sees_is_shown_the_source_at_a_megapixel_for_both_prompts(found: dict[str, Any]) -> None:
    assert found["seen"]["shapes"] == [[1, 724, 1448, 3]] * 2  # 128 x 64, enlarged


def test_a_model_that_looks_at_no_reference_latent_takes_no_source(found: dict[str, Any]) -> None:
    assert found["sd15"]["sources"] == [0, 0]
    assert found["flux"]["sources"] == [0, 8]


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_two_models_are_compared_on_the_pictures_that_the_prompts_bring(found: dict[str, Any], family: str) -> None:
    assert found[family]["compared"] == [True, True]


def test_two_models_that_edit_nothing_are_not_compared_on_edits(found: dict[str, Any]) -> None:
    assert "'red' brings a picture to edit, and model_after looks at none" in found["sd15"]["compared"]


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_what_is_foretold_counts_the_source_too(found: dict[str, Any], family: str) -> None:
    without, with_source = found[family]["counted"]
    assert with_source > 1.2 * without > 0
