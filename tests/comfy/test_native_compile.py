"""The native policy with the network's repeated blocks under torch.compile: the same gradients, and few graphs."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_fixtures import seen_by

TOLERANCE = 1e-5
"""Of predictions, pictures and gradients, as a share of the largest value: float32 sums in another order."""
KINDS = {"sd15": 1, "flux": 2}
"""Of repeated blocks; the small networks have 4 and 6 of them."""
MOST = 32
"""Graphs of all kinds, of the 64 that each may have: for batches of one row and of others, with gradients (also to the
block's input, or not), without (of two adapters and none), and for pictures, which are drawn in inference mode."""


found = seen_by("comfy_native_compile.py", timeout=1800)


@pytest.mark.parametrize("family", KINDS)
def test_gradients_and_pictures_are_those_of_the_network_as_it_is(found: dict[str, Any], family: str) -> None:
    case = found[family]["training"]
    assert case["prediction"] < TOLERANCE
    assert case["gradient"] < TOLERANCE
    assert max(case["checkpointed"]) < TOLERANCE
    assert case["picture"] < TOLERANCE


@pytest.mark.parametrize("family", KINDS)
def test_blocks_are_one_graph_each_that_keeps_no_weight(found: dict[str, Any], family: str) -> None:
    case = found[family]["training"]
    assert case["breaks"] == found[family]["sizes"]["breaks"] == 0
    assert case["saved"] == 0


@pytest.mark.parametrize("family", KINDS)
def test_blocks_of_a_kind_share_graphs_of_all_batch_sizes(found: dict[str, Any], family: str) -> None:
    training, steps = found[family]["training"]["graphs"], found[family]["sizes"]["graphs"]
    *batches, once, twice = steps
    assert training <= 3 * KINDS[family]
    assert batches[2:] == [batches[2]] * len(batches[2:])
    assert twice == once <= MOST


def test_dropout_masks_are_the_same(found: dict[str, Any]) -> None:
    assert found["dropping"] < TOLERANCE


def test_a_compiled_training_leaves_the_network_as_it_was(found: dict[str, Any]) -> None:
    assert found["restoring"] == {"left": [], "same": True, "graphs": 0, "pictures": True}


def test_blocks_with_patches_run_as_they_are(found: dict[str, Any]) -> None:
    assert found["patched"]["gradient"] < TOLERANCE
    assert found["patched"]["graphs"] == 0


def test_a_model_from_comfyuis_node_trains_as_one_without_it(found: dict[str, Any]) -> None:
    case = found["comfyuis_own"]
    assert case["same"]
    assert case["graphs"] == 0
    assert case["still_compiled"]  # for the rest of the graph


def test_the_node_turns_it_on(found: dict[str, Any]) -> None:
    assert found["offered"] == ["", "inductor"]


def test_what_cannot_be_compiled_or_trained_is_told(found: dict[str, Any]) -> None:
    assert found["comfyuis_own"]["put"].startswith("A node has put compiled parts in the place of the MODEL's own")
    assert found["refused"]["broken"].startswith("torch.compile does not work here (")
    assert found["refused"]["broken"].endswith("set memory.compile to off.")
    assert "no repeated blocks" in found["refused"]["no_blocks"]
