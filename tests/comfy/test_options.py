"""A ComfyUI that was started otherwise than by default: the nodes go by its options."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from comfy_checkpoint import checkpoint
from comfy_native_graphs import graph
from comfy_results import line
from comfy_server import ComfyServer


@pytest.fixture(scope="module")
def keeps_nothing(_comfyui: None) -> Iterator[ComfyServer]:
    with ComfyServer(arguments=["--cache-none"]) as server:
        yield server


def test_a_native_policy_trains_and_goes_on_where_comfyui_keeps_no_output(keeps_nothing: ComfyServer) -> None:
    """The MODEL is dropped as soon as its last reader has run, before anything is drawn."""
    checkpoint(keeps_nothing)
    others = ("lora", "said")  # and ordinary pictures, which would read the MODEL later
    training = {
        name: n for name, n in graph(-1).items() if name not in others and not name.startswith(("plain", "trained"))
    }
    training["model"] = {"class_type": "DGPO_PolicyModel", "inputs": {"policy": ["trainer", 0], "weights": "ema"}}
    training["merged"] = {"class_type": "ModelSave", "inputs": {"model": ["model", 0], "filename_prefix": "trained"}}
    for _ in range(2):
        keeps_nothing.run(training)
    assert len(line(keeps_nothing, "native")) == 2
