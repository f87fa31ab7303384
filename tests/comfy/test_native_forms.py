"""The native policy's forms in a real ComfyUI: dropout, a LoRA to start from, conditionings, a MODEL that comes out."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_families import MODULES, TOLERANCE
from comfy_fixtures import seen_by

families = pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])


found = seen_by("comfy_native_forms.py", timeout=900)


@families
def test_dropout_is_repeated_by_the_seed_and_by_checkpointing(found: dict[str, Any], family: str) -> None:
    case = found["dropout"][family]
    assert case["repeats"] == 0
    assert min(case["effect"], case["other_seed"]) > 1000 * TOLERANCE
    assert max(case["checkpointed"], case["gradient"]) < TOLERANCE
    assert case["texts"] < TOLERANCE  # each row its own mask, whichever texts are beside it
    assert case["off"]


def test_weights_of_words_count_as_in_clip_text_encode(found: dict[str, Any]) -> None:
    assert found["weighted"]["same"]
    assert found["weighted"]["effect"] > 1000 * TOLERANCE


@families
def test_a_saved_lora_is_gone_on_from(found: dict[str, Any], family: str) -> None:
    case = found["starting"][family]
    assert max(case["same"], case["larger"]) < TOLERANCE  # all three adapters
    assert case["base"] < TOLERANCE  # the reference is the MODEL without it
    assert case["small"].endswith("has rank 4: set the rank to at least that, not 2.")
    assert case["targets"].endswith("which has no adapter here: add it to the LoRA targets.")


def test_a_lora_with_q_k_and_v_apart_is_gone_on_from(found: dict[str, Any]) -> None:
    assert found["from_diffusers"]["same"] < TOLERANCE
    assert found["from_diffusers"]["effect"] > 1000 * TOLERANCE


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("gone", "There is no LoRA gone.safetensors"),
        ("other", "is for another model"),
        ("text", "also changes the text encoder"),
        ("shape", "joint_blocks.0.x_block.attn.proj is (128, 128) in the model and (8, 8) in the file"),
        ("dora", "joint_blocks.0.x_block.attn.proj is of the form DoRA; apply it in ComfyUI"),
        ("kernel", "attentions_0_proj_in is a convolution, which gets no adapter here: put that LoRA on the MODEL"),
    ],
)
def test_a_lora_that_does_not_fit_is_told(found: dict[str, Any], file: str, sentence: str) -> None:
    assert sentence in found["refused"][file]


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_conditionings_train_what_a_clip_trains_on_them(found: dict[str, Any], family: str) -> None:
    case = found["conditioning"][family]
    assert case["prompts"] == [["red", "blue"], 2, 0]
    assert case["same_state"]  # weights, optimiser and averages after a step, bit for bit


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_run_is_tied_to_the_numbers_of_its_conditionings(found: dict[str, Any], family: str) -> None:
    case = found["conditioning"][family]
    assert case["other_root"]
    assert case["one_token"]
    assert case["other_negative"]
    assert case["named_alike"]  # encoded anew, as after a restart
    assert case["resumed"]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("unknown", "no CONDITIONING for the text 'green': add a Conditioned Prompt with it"),
        ("negative", "no CONDITIONING for the text 'ugly'"),
        ("twice", "Two Conditioned Prompts have the text 'red'"),
        ("empty", "needs a text"),
    ],
)
def test_a_text_without_a_conditioning_is_told(found: dict[str, Any], case: str, sentence: str) -> None:
    assert sentence in found["sentences"][case]


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_areas_and_ranges_of_noise_count_for_each_sample(found: dict[str, Any], family: str) -> None:
    case = found["ranges"][family]
    assert case["areas"] < TOLERANCE
    assert max(case["early"], case["late"]) < TOLERANCE  # samples of one text at two noise levels
    assert case["texts"] > 1000 * TOLERANCE


def test_a_controlnet_steers_and_gets_no_gradient(found: dict[str, Any]) -> None:
    case = found["controlled"]
    assert case["effect"] > 1000 * TOLERANCE
    assert case["reached"] == 2 * MODULES["sd15"]
    assert case["checkpointed"] < TOLERANCE
    assert case["others"] == 0
    assert case["strength"]


@families
def test_the_model_that_comes_out_is_the_trained_one(found: dict[str, Any], family: str) -> None:
    case = found["model"][family]
    assert case["patches"] == MODULES[family]
    assert case["loaded"] < TOLERANCE
    assert case["differs"]
    assert case["plain"]
    assert case["untrained"].startswith("This policy is not trained yet: connect the one")


@families
def test_the_model_that_came_in_is_left_as_it_was(found: dict[str, Any], family: str) -> None:
    assert found["model"][family]["base"]


def test_another_kind_of_policy_names_the_lora_loader(found: dict[str, Any]) -> None:
    assert "connect the trainer's lora and a MODEL to DGPO LoRA Loader" in found["model"]["sd15"]["other_policy"]


def test_the_settings_of_a_patch_are_part_of_what_a_model_is(found: dict[str, Any]) -> None:
    assert found["patches"] == {"same": True, "other": True, "none": True}
