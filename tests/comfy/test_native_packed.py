"""The native policy on a copy of the MODEL in fewer bytes."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_fixtures import seen_by

TOLERANCE = 1e-5
"""Of predictions and gradients, as a share of the largest value: float32 sums in another order. 2e-6 was measured."""
ROUNDING = {"fp8": 0.04, "int8": 0.015}  # of normal weights, relative
LAYERS = {"sd15": 40, "flux": 39, "qwen": 42}
SIZE = {"sd15": 0.9, "flux": 0.45, "qwen": 0.45}
"""Of the network that is loaded, as a share of the whole one: a quarter of its Linears in float32, and all else."""


found = seen_by("comfy_native_packed.py", timeout=900)


def assert_exact(case: dict[str, Any]) -> None:
    """Predictions and gradients are plain autograd's, with and without checkpointing."""
    assert case["prediction"] < TOLERANCE
    assert case["gradient"] < TOLERANCE
    assert max(case["checkpointed"]) < TOLERANCE


@pytest.mark.parametrize("kind", ROUNDING)
@pytest.mark.parametrize("family", LAYERS)
def test_gradients_are_those_on_the_rounded_weights(found: dict[str, Any], family: str, kind: str) -> None:
    case = found["trained"][f"{family} {kind}"]
    assert_exact(case)
    assert 0 < case["rounding"] < ROUNDING[kind]
    assert case["layers"] == LAYERS[family]
    assert case["kept_whole"] == []
    assert case["size"] < SIZE[family]


@pytest.mark.parametrize("kind", ROUNDING)
@pytest.mark.parametrize("family", LAYERS)
def test_the_model_on_the_input_stays_whole_and_the_lora_ordinary(
    found: dict[str, Any], family: str, kind: str
) -> None:
    case = found["trained"][f"{family} {kind}"]
    assert case["restored"]
    assert case["untouched"]
    assert case["same_keys"]


@pytest.mark.parametrize("family", ["sd15", "qwen"])
def test_a_lora_of_the_users_is_in_the_packed_weights(found: dict[str, Any], family: str) -> None:
    case = found["patched"][family]
    assert_exact(case)
    assert 0 < case["rounding"] < ROUNDING["int8"]
    assert case["restored"]


@pytest.mark.parametrize("family", ["sd15", "qwen"])
def test_packed_layers_that_did_not_fit_come_where_they_are_used(found: dict[str, Any], family: str) -> None:
    case = found["partly"][family]
    assert_exact(case)
    assert case["left"] > 0


def test_what_is_learned_and_drawn_is_near_the_whole_models(found: dict[str, Any]) -> None:
    assert 0 < found["learning"]["gradient"] < 0.05
    assert 0 < found["learning"]["drawn"] < 0.05


def test_what_the_graph_has_quantised_stays_so(found: dict[str, Any]) -> None:
    assert found["stays"] == ["transformer_blocks.0.attn.to_q"]
    assert "No layer of the MODEL can be quantised to int8" in found["refused"]["small"]


def test_an_unknown_kind_is_told_with_the_known_ones(found: dict[str, Any]) -> None:
    assert "'int3': use one of none, fp8, int8, nf4" in found["refused"]["unknown"]
