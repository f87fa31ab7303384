"""Blocks in main memory: each comes to the device in its turn, and nothing of what is computed changes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from engine import distance, gradient, moved, write_quick
from safetensors.torch import load_file
from torch import Tensor, nn

from dgpo_core import train
from dgpo_core.policy import load_policy
from dgpo_core.policy.host_blocks import Blocks, HostLinear, keep_on_host
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.policy.quantised import QuantisedLinear

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
BNB = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


class Block(nn.Module):
    """Two Linears, one of them in a list as diffusers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.more = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, *self.more):
            x = part(x).tanh()
        return x


def network(count: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *(Block() for _ in range(count))).requires_grad_(False)


def trained_gradient(policy: DiffusersPolicy) -> tuple[Tensor, Tensor]:
    """Prediction and gradient of a loss of all outputs with an adapter that does something."""
    moved(policy, "current", seed=3, size=0.1)
    out = policy.predict(*tiny.inputs(policy))
    out.square().mean().backward()
    return out.detach(), gradient(policy)


def packed(policy: DiffusersPolicy) -> list[nn.Module]:
    return [module for module in policy.network.modules() if isinstance(module, QuantisedLinear)]


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_forward_and_gradient_are_those_of_the_same_linears_to_the_bit() -> None:
    plain, other = network(4), network(4)
    keep_on_host(other, CPU, {"Block"})
    assert sum(isinstance(module, HostLinear) for module in other.modules()) == 8
    x = torch.randn(3, 5, 8)
    found = []
    for each in (plain, other):
        start = x.clone().requires_grad_()
        each(start).square().sum().backward()
        found.append((each(x), start.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_the_network_itself_holds_no_weight_of_its_blocks() -> None:
    other = network(4)
    weights = {name: p.nbytes for name, p in other.named_parameters() if name.endswith("weight")}
    blocks = keep_on_host(other, CPU, {"Block"})
    assert [name for name, _ in other.named_parameters() if name.endswith("weight")] == ["0.weight"]
    assert not dict(other.named_buffers())
    assert blocks.bytes == sum(weights.values()) - weights["0.weight"]


def test_three_blocks_at_most_are_on_the_device_and_the_next_comes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    other = network(6)
    blocks = keep_on_host(other, CPU, {"Block"})
    brought: list[int] = []
    working: list[int] = []
    most = 0
    bring, turn = blocks._brought, blocks._turn_to

    def counted(block: int) -> object:
        brought.append(block)
        return bring(block)

    def turned(block: int, purpose: str) -> None:
        nonlocal most
        working.append(block)
        there = set(blocks.there)
        turn(block, purpose)
        most = max(most, len(blocks.there))
        late.append(block not in there)

    late: list[bool] = []
    monkeypatch.setattr(blocks, "_brought", counted)
    monkeypatch.setattr(blocks, "_turn_to", turned)

    def step() -> None:
        with torch.no_grad():
            other(torch.randn(2, 8))
            other(torch.randn(2, 8))
        other(torch.randn(2, 8, requires_grad=True)).sum().backward()

    step()
    assert working == [*range(6)] * 3 + [4, 3, 2, 1, 0]
    assert most <= 3
    step()  # the way from the last backward to the first forward is known only after this one
    late.clear()
    brought.clear()
    step()
    assert not any(late)
    assert len(brought) <= 6 * 3 + 6


def test_a_layer_says_what_it_is_without_its_weight() -> None:
    other = network(1)
    keep_on_host(other, CPU, {"Block"})
    layer = other[1].first
    assert layer.weight.shape == (8, 8)
    assert layer.weight.dtype == torch.float32
    assert layer.weight.untyped_storage().nbytes() == 4
    assert layer.bias is not None


def test_blocks_are_brought_to_where_they_are_moved() -> None:
    blocks = Blocks(CPU)
    blocks.add({"a": {"weight": torch.ones(2, 2)}})
    assert blocks.parts(0, "a", "forward")["weight"].device == CPU
    blocks.move(torch.device("meta"))
    assert blocks.parts(0, "a", "forward")["weight"].device.type == "meta"


# --- a policy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", tiny.BUILDERS)
def test_a_policys_gradient_is_that_of_one_in_whole(family: str, checkpointing: bool) -> None:
    policies = [load_policy(tiny.folder(family), rank=2, offload_blocks=there) for there in (False, True)]
    assert any(isinstance(module, HostLinear) for module in policies[1].network.modules())
    if checkpointing:
        for policy in policies:
            policy.enable_gradient_checkpointing()
    (out, expected), (same, found) = map(trained_gradient, policies)
    assert torch.equal(out, same)
    assert torch.equal(expected, found)


@pytest.mark.parametrize(("family", "kind"), [("flux", "int8"), ("sdxl", "fp8"), pytest.param("sd3", "nf4", marks=BNB)])
def test_quantised_blocks_stay_packed_in_main_memory(family: str, kind: str) -> None:
    policies = [load_policy(tiny.folder(family), rank=2, quantize=kind, offload_blocks=b) for b in (False, True)]
    kept = [sum(b.nbytes for layer in packed(p) for b in layer.buffers(recurse=False)) for p in policies]
    assert kept[1] < kept[0]
    assert policies[1].blocks is not None
    assert kept[1] + policies[1].blocks.bytes == kept[0]
    (out, expected), (same, found) = map(trained_gradient, policies)
    assert torch.equal(out, same)
    assert torch.equal(expected, found)


def test_compiled_blocks_give_the_same() -> None:
    plain = load_policy(tiny.folder("sd3"), rank=2)
    other = load_policy(tiny.folder("sd3"), rank=2, offload_blocks=True)
    other.compile(backend="eager")
    assert distance(trained_gradient(other)[1], trained_gradient(plain)[1]) < 1e-5


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("rewards")
def test_a_run_ends_in_the_same_lora_and_may_change_its_mind(here: Path, sd3_folder: Path) -> None:
    argv = write_quick(here, sd3_folder, evaluation={"every": 0, "final_images": 0})
    assert train.main([*argv, "--name", "whole"]) == 0
    assert train.main([*argv, "--name", "parted", "--iterations", "2", "--memory.offload_blocks"]) == 0
    assert train.main([*argv, "--name", "parted", "--resume"]) == 0
    first, second = (load_file(here / f"runs/{name}/lora.safetensors") for name in ("whole", "parted"))
    assert all(torch.equal(first[key], second[key]) for key in first)
