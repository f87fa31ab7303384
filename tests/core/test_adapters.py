"""Adapters on every family: switching is exact and cheap, the current one alone learns, and the seed decides."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.policy import FAMILIES, load_policy
from dgpo_core.policy.pipeline import DiffusersPolicy


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_none_is_the_base_bit_for_bit_and_switching_copies_no_weight(family: str) -> None:
    policy = load_policy(tiny.folder(family), rank=2)
    args = tiny.inputs(policy)
    with torch.no_grad():
        base = _bare(family, tiny.folder(family), policy, args)
        states = {name: policy.adapter_state(name) for name in ("current", "old", "ema")}
        pointers = {name: [p.data_ptr() for p in state.values()] for name, state in states.items()}
        for i, state in enumerate(states.values(), start=1):
            for key, parameter in state.items():
                if "lora_B" in key:
                    parameter.fill_(0.1 * i)
        answers = {}
        for name in (None, "current", "old", "ema", None, "current"):
            with policy.using(name):
                answer = policy.predict(*args)
            assert name not in answers or torch.equal(answer, answers[name])
            answers[name] = answer
    assert torch.equal(answers[None], base)
    assert len({a.sum().item() for a in answers.values()}) == 4
    assert pointers == {name: [p.data_ptr() for p in policy.adapter_state(name).values()] for name in states}


def _bare(family: str, folder: Path, policy: DiffusersPolicy, args: tuple[Any, ...]) -> Tensor:
    """The prediction of the network as loaded, before any adapter was added."""
    import diffusers

    from dgpo_core.policy.own_memory import own_memory

    cls = type(policy.network)
    network = getattr(diffusers, cls.__name__).from_pretrained(folder / policy.network_name).eval()
    own_memory(network)
    own, policy.network = policy.network, network
    try:
        return policy.predict(*args)
    finally:
        policy.network = own


def test_switching_restores_what_was_active_also_after_an_error() -> None:
    policy = tiny.shared("sd3")
    assert policy.adapters.active == "current"
    with policy.using("old"):
        with pytest.raises(ZeroDivisionError), policy.using(None):
            _ = 1 / 0
        assert policy.adapters.active == "old"
    assert policy.adapters.active == "current"


def test_peft_sees_the_switch() -> None:
    """The switch writes attributes of peft's layers: this fails if peft renames them."""
    from peft.tuners.lora import LoraLayer

    policy = tiny.shared("sd3")
    layers = [m for m in policy.network.modules() if isinstance(m, LoraLayer)]
    with policy.using("old"):
        assert all(m.active_adapters == ["old"] and not m.disable_adapters for m in layers)
        with policy.using(None):
            assert all(m.disable_adapters for m in layers)


def test_switching_takes_microseconds_per_layer() -> None:
    policy = tiny.shared("sd15")
    layers = len(policy.trainable()) // 2
    started = time.process_time()
    for _ in range(100):
        with policy.using("old"):
            pass
    # CPU time, not wall time: a busy machine is no failure; 2 us per layer is ten times what it takes
    assert (time.process_time() - started) / 200 / layers < 2e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_current_adapter_ever_learns(family: str) -> None:
    policy = load_policy(tiny.folder(family), rank=2)
    args = tiny.inputs(policy)
    with torch.no_grad():
        for name in ("old", None, "ema"):
            with policy.using(name):
                policy.predict(*args)
    policy.predict(*args).square().mean().backward()
    trainable = policy.trainable()
    assert all(p.dtype == torch.float32 for p in trainable.values())
    assert all(p.grad is not None for p in tiny.used(policy).values())
    assert any(p.grad.abs().max() > 0 for key, p in tiny.used(policy).items() if "lora_B" in key)
    mine = {id(p) for p in trainable.values()}
    learning = [
        p
        for m in policy.pipe.components.values()
        if hasattr(m, "parameters")
        for p in m.parameters()
        if p.requires_grad
    ]
    assert {id(p) for p in learning} == mine
    assert not any(p.grad is not None for name in ("old", "ema") for p in policy.adapter_state(name).values())
    assert list(trainable) == list(policy.adapter_state("old")) == list(policy.adapter_state("ema"))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_default_targets_are_every_q_k_v_and_out_projection_of_both_streams(family: str) -> None:
    policy = tiny.shared(family)
    modules = {key.split(".lora_")[0] for key in policy.trainable()}
    image = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
    text = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
    expected = {f"transformer_blocks.0.{name}" for name in image + text}
    if family == "sd3":  # the last block gives no text on: it has no out projection for it
        expected |= {f"transformer_blocks.1.{name}" for name in (image + text)[:-1]}
    else:  # a single block has one stream and its out projection is shared with the feed-forward
        expected |= {f"single_transformer_blocks.0.{name}" for name in image[:-1]}
    assert modules == expected


@pytest.mark.slow
def test_the_start_depends_on_the_seed_alone() -> None:
    folder = tiny.folder("sd3")
    torch_state, a = torch.get_rng_state(), load_policy(folder, rank=2, seed=5)
    b, c = load_policy(folder, rank=2, seed=5), load_policy(folder, rank=2, seed=6)
    assert torch.equal(torch.get_rng_state(), torch_state)  # and nobody's random numbers are used up
    key = "transformer_blocks.0.attn.to_q.lora_A.weight"
    assert torch.equal(a.trainable()[key], b.trainable()[key])
    assert not torch.equal(a.trainable()[key], c.trainable()[key])
    for name in ("old", "ema"):
        assert all(torch.equal(v, a.trainable()[k]) for k, v in a.adapter_state(name).items())
    rows = torch.cat([p.flatten() for k, p in a.trainable().items() if "lora_A" in k])
    assert abs(rows.std().item() * 2 - 1) < 0.1  # gaussian with 1 / rank


def test_dropout_is_on_for_the_current_adapter_in_training_only() -> None:
    policy = load_policy(tiny.folder("sd3"), rank=4, dropout=0.5)
    with torch.no_grad():
        for name in ("current", "old"):
            for parameter in policy.adapter_state(name).values():
                parameter.fill_(0.1)
    args = tiny.inputs(policy)

    def differs(name: Any, *seeds: int) -> bool:
        with torch.no_grad(), policy.using(name):
            plain = policy.predict(*args)
            with policy.dropping(seeds):
                return not torch.equal(policy.predict(*args), plain)

    assert differs("current", 1, 2)
    assert not differs("old", 1, 2)
    assert not differs(None, 1, 2)
    assert not differs("current")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 2, "alpha": 0.0}, "alpha must be above 0"),
        ({"rank": 2, "dropout": 1.0}, "below 1"),
        ({"rank": 2, "targets": ["to_nothing"]}, "to_nothing"),
    ],
)
def test_impossible_adapters_are_told(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_policy(tiny.folder("sd3"), **options)
