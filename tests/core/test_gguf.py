"""GGUF files: the network as the file has it, packed while it is not in use, and trained beside."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from engine import distance, gradient, moved
from torch import nn

from dgpo_core.common.errors import UserError
from dgpo_core.policy import load_policy
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.policy.quantised import QuantisedLinear

gguf = pytest.importorskip("gguf")
gguf_model = pytest.importorskip("gguf_model")
pytestmark = pytest.mark.slow

ERROR = {"BF16": 0.005, "Q8_0": 0.01, "Q5_1": 0.05, "Q4_0": 0.12}  # of weights, relative


def load(folder: Path, kind: str, **options: object) -> DiffusersPolicy:
    """A small SD1.5 whose network is a GGUF file; the folder beside it has the rest."""
    return load_policy(gguf_model.write(folder, kind), rank=2, **options)


def packed(policy: DiffusersPolicy) -> list[tuple[str, QuantisedLinear]]:
    return [(n, m) for n, m in policy.network.named_modules() if isinstance(m, QuantisedLinear)]


@pytest.mark.parametrize("kind", ERROR)
def test_a_file_is_its_model_as_it_was_rounded(kind: str, tmp_path: Path) -> None:
    policy = load(tmp_path, kind)
    full = load_policy(tmp_path / "model", rank=2)
    assert policy.family == "sd15"
    assert bool(packed(policy)) == (kind != "BF16")
    ours = {n.replace(".base_layer", ""): m for n, m in policy.network.named_modules() if isinstance(m, nn.Linear)}
    for name, module in full.network.named_modules():
        if isinstance(module, nn.Linear) and "lora" not in name:
            assert distance(ours[name.replace(".base_layer", "")].weight, module.weight) < ERROR[kind]
    out, expected = (p.predict(*tiny.inputs(p)).detach() for p in (policy, full))
    assert distance(out, expected) < 3 * ERROR[kind]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_the_gradient_of_the_lora_is_plain_autograds_on_the_rounded_weights(
    kind: str, checkpointing: bool, tmp_path: Path
) -> None:
    policy, plain = load(tmp_path, kind), load(tmp_path, kind)
    if checkpointing:
        policy.enable_gradient_checkpointing()
    for name, layer in packed(plain):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight, linear.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
        within, _, last = name.rpartition(".")
        setattr(plain.network.get_submodule(within), last, linear.requires_grad_(False))
    found = []
    for each in (policy, plain):
        moved(each, "current", seed=3, size=0.1)
        each.predict(*tiny.inputs(each)).square().mean().backward()
        found.append(gradient(each))
    assert distance(*found) < 1e-5  # float32 in another order


def test_packed_layers_take_the_bytes_of_the_file(tmp_path: Path) -> None:
    for kind, bits in (("Q8_0", 8.5), ("Q4_0", 4.5)):
        layers = [layer for _, layer in packed(load(tmp_path, kind, dtype="bf16"))]
        assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
        for layer in layers:
            size = sum(buffer.nbytes for buffer in layer.buffers())
            assert size == layer.in_features * layer.out_features * bits / 8


def test_layers_that_the_file_left_whole_are_quantised_where_that_is_asked_for(tmp_path: Path) -> None:
    policy = load(tmp_path, "BF16", quantize="int8")
    assert packed(policy)


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_model.write(tmp_path, "Q8_0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package gguf, which is not installed: run `pip install"):
        load_policy(path)


def test_a_network_without_its_text_encoders_says_where_they_belong(tmp_path: Path) -> None:
    path = gguf_model.write(tmp_path, "Q8_0")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(UserError, match="has no whole text_encoder and no whole vae: .* put a diffusers folder"):
        load_policy(path)
