"""LoRAs of other trainers in a real ComfyUI: the loader applies what a training starts from, and tells the rest."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_families import LORA_FAMILIES, TOLERANCE
from comfy_fixtures import seen_by

found = seen_by("comfy_lora_forms.py", timeout=600)


@pytest.mark.parametrize("style", ["kohya", "generic"])
@pytest.mark.parametrize("family", LORA_FAMILIES)
def test_a_training_starts_from_what_the_loader_applies(found: dict[str, Any], family: str, style: str) -> None:
    """All layers by the names of the network's makers, q, k and v in one, alpha / rank one half."""
    if f"{family} {style}" not in found["makers"]:
        pytest.skip(f"This ComfyUI knows no {family}.")
    case = found["makers"][f"{family} {style}"]
    assert case["info"] == f"{case['modules']} of {case['modules']} modules applied"
    assert case["same"] < 10 * TOLERANCE  # three times as many layers are changed
    assert case["effect"] > 1000 * TOLERANCE


def test_forms_that_comfyui_applies_are_applied_and_others_are_told(found: dict[str, Any]) -> None:
    case = found["forms"]
    assert set(case["applied"].values()) == {"1 of 1 modules applied"}
    says = {
        "DoRA of peft": "does not know (DoRA,",
        "bias": "does not know (LoRA with a bias,",
        "IA3": "does not know (IA3,",
        "half": "has tensors that do not belong together",
        "half LoHa": "has tensors that do not belong together",
        "not finite": "holds numbers that are not finite",
        "infinite": "holds numbers that are not finite",
        "whole numbers": "of the type int32",
        "alpha of three": "an alpha of 3 numbers",
        "alpha that is none": "holds numbers that are not finite",
        "other rank": "other shapes",
        "no rank": "has an empty tensor",
    }
    assert set(says) == set(case["refused"])
    for name, sentence in says.items():
        assert sentence in case["refused"][name]
        assert "transformer_blocks.0.attn.to_q" in case["refused"][name]
    assert case["mixed"].startswith("1 of 2 modules applied; 1 in a form that ComfyUI does not know (DoRA), such as")


def test_a_lora_with_a_nan_is_refused_and_alpha_in_the_header_counts(found: dict[str, Any]) -> None:
    case = found["forms"]
    assert "lora_unet_" in case["NaN"]
    assert "not finite" in case["NaN"]
    assert list(case["alpha"].values()) == [8.0]  # of rank 2: scale 4
