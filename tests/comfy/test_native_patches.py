"""What other nodes put on a MODEL and on its CONDITIONING, in a real ComfyUI: it counts as it does while drawing, or is
told."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_families import TOLERANCE
from comfy_fixtures import seen_by

found = seen_by("comfy_native_patches.py", timeout=900)


def test_a_patch_for_some_noise_levels_counts_for_the_rows_that_have_them(found: dict[str, Any]) -> None:
    case = found["levels"]
    assert case["rows"] < TOLERANCE
    assert case["noisiest"] > 1000 * TOLERANCE
    assert case["cleanest"] < TOLERANCE


def test_a_patch_that_draws_lots_draws_the_same_ones_each_time(found: dict[str, Any]) -> None:
    case = found["lots"]
    assert case["effect"] > 1000 * TOLERANCE
    assert case["repeats"] == case["gradient"] == case["drawn"] == 0
    assert max(case["checkpointed"], case["rows"]) < TOLERANCE
    assert case["untouched"]  # what others draw from torch's generator


def test_an_attention_without_a_backward_is_told(found: dict[str, Any]) -> None:
    assert found["overridden"]["with"] < TOLERANCE
    assert found["overridden"]["without"].startswith("A node has put an attention on the MODEL that cannot be trained")


def test_a_network_of_another_node_that_a_gradient_must_pass_is_told(found: dict[str, Any]) -> None:
    assert found["grounded"].startswith("A node has put a network of its own on the MODEL or its CONDITIONING")


def test_a_lora_on_a_hook_is_told_before_anything_is_drawn_and_may_be_on_the_negative(found: dict[str, Any]) -> None:
    sentence = "The CONDITIONING has a hook with weights (such as Create Hook LoRA)"
    assert found["hooked"]["prompt"].startswith(sentence)
    assert found["hooked"]["clip"].startswith(sentence)
    assert found["hooked"]["negative"] == "native"  # which is not trained


def test_settings_of_a_clip_and_of_a_controlnet_are_part_of_what_a_policy_is(found: dict[str, Any]) -> None:
    assert found["apart"] == dict.fromkeys(("without_options", "options", "types", "loras"), True)


def test_a_cache_between_steps_gathers_nothing_while_it_trains(found: dict[str, Any]) -> None:
    if not found["gathered"]:
        pytest.skip("this ComfyUI has no EasyCache")
    first, *_, last = found["gathered"]
    assert last == first
