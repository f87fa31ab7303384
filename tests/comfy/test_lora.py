"""The LoRA nodes in a real ComfyUI: a LoRA of the engine does there what it does in diffusers."""

from __future__ import annotations

import os
from typing import Any

import pytest
from comfy_families import LORA_FAMILIES, TOLERANCE
from comfy_fixtures import seen_by

TRAINED = "DGPO step 60, rewards shapes_graded=1, base sd3, made for sd3, rank 4"


found = seen_by("comfy_lora.py", timeout=600)


def _of(found: dict[str, Any], family: str) -> dict[str, Any]:
    if family not in found["families"]:
        pytest.skip(f"This ComfyUI knows no {family}.")
    return found["families"][family]


@pytest.mark.parametrize("family", LORA_FAMILIES)
def test_the_lora_does_what_it_does_in_diffusers(found: dict[str, Any], family: str) -> None:
    case = _of(found, family)
    assert case["base"] < TOLERANCE  # the same network
    assert case["lora"] < TOLERANCE
    assert case["effect"] > 1000 * TOLERANCE  # it changes much more than that
    count = case["modules"]
    assert case["info"].startswith(f"{count} of {count} modules applied; DGPO step 60, rewards shapes_graded=1, ")
    assert case["clip"] is None


@pytest.mark.parametrize("family", LORA_FAMILIES)
def test_the_model_on_the_input_is_left_alone(found: dict[str, Any], family: str) -> None:
    case = _of(found, family)
    assert case["untouched"]
    assert case["restored"]


@pytest.mark.parametrize("family", LORA_FAMILIES)
def test_comfyuis_own_loader_knows_the_names(found: dict[str, Any], family: str) -> None:
    case = _of(found, family)
    if case["core_kohya"] is None:
        assert case["core"] == case["modules"]
    else:  # it does not know the names that diffusers gives the modules of a UNet, but kohya's
        assert case["core_kohya"] == case["modules"]


def test_a_lora_that_fits_nowhere_is_an_error(found: dict[str, Any]) -> None:
    case = found["loader"]
    assert case["foreign"] == "The LoRA sd3.safetensors has no layer of this model: it was made for sd3."
    assert "it was made for another one" in case["unnamed"]
    assert case["only_text"].endswith("changes only the text encoder: connect a CLIP.")


def test_a_lora_that_fits_in_part_says_so(found: dict[str, Any]) -> None:
    case = found["loader"]
    assert case["partial"] == (
        "15 of 16 modules applied; 1 not in this model, such as transformer.transformer_blocks.9.attn.to_q"
    )
    assert case["misfit"] == (
        "14 of 15 modules applied; 1 of other shapes than this model's, such as "
        "transformer.transformer_blocks.0.attn.to_q"
    )
    assert case["untouched"]


def test_a_connected_lora_is_used_instead_of_a_file(found: dict[str, Any]) -> None:
    assert found["loader"]["connected"] == f"15 of 15 modules applied; {TRAINED}"
    assert found["loader"]["native"] == "1 of 1 modules applied"


def test_text_encoders_get_their_part(found: dict[str, Any]) -> None:
    assert "1 of the text encoder left out: no CLIP is connected" in found["loader"]["without_clip"]
    assert found["loader"]["with_clip"] == "16 of 16 modules applied"
    assert found["loader"]["clip_patches"] == 1


def test_only_safetensors_in_the_loras_folders_are_read(found: dict[str, Any]) -> None:
    case = found["files"]
    assert case["there"] is case["linked"] is True
    assert "choose a file, or connect" in case["none"]
    assert "There is no LoRA gone.safetensors" in case["absent"]
    assert "There is no LoRA ../outside.safetensors" in case["outside"]
    assert "not a .safetensors file" in case["pickle"]
    assert case["pickle_run"] == case["pickle"]
    assert "not a readable .safetensors file" in case["broken"]
    assert case["fingerprint"]


def test_saving_counts_up_and_the_file_is_there_at_once(found: dict[str, Any]) -> None:
    case = found["save"]
    names = [os.path.join("dgpo", f"new_0000{i}.safetensors") for i in (1, 2)]
    assert case["saved"] == case["listed"] == names
    assert case["ui"] == {"text": names[:1]}
    assert case["left"] == ["new_00001.safetensors", "new_00002.safetensors"]
    assert case["offered"]
    assert case["same"]
    assert case["metadata"]["own"]
    assert case["metadata"]["note"] == "a test"
    assert case["info"] == f"15 of 15 modules applied; {TRAINED}"


def test_names_outside_the_output_folder_are_refused(found: dict[str, Any]) -> None:
    case = found["save"]
    assert [name for name, result in case["names"].items() if result is True] == ["dgpo/lora"]
    assert case["linked"] is True
    assert "not of the form key=value" in case["bad_metadata"]


def test_every_input_and_output_has_a_tooltip(found: dict[str, Any]) -> None:
    assert found["lacking_tooltips"] == []
