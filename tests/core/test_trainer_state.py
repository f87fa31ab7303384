"""What stops a trainer leaves it as it was, and what it saves is enough to go on bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Calls, distance, everything, learned, make_trainer, moved, quick, snapshot, weights
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.policy import load_policy
from dgpo_core.policy.pipeline import DiffusersPolicy

pytestmark = pytest.mark.slow

# --- what goes wrong -------------------------------------------------------------------------------------------------


def broken(policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch, value: float) -> list[bool]:
    """From now on forwards with gradients answer `value`, while the returned list holds True."""
    on, real = [False], policy.predict

    def predict(*args: Any) -> Tensor:
        f = real(*args)
        return f * value if on[0] and torch.is_grad_enabled() else f

    monkeypatch.setattr(policy, "predict", predict)
    return on


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_with_the_state_before_it(
    value: float, policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(policy, quick())
    on = broken(policy, monkeypatch, value)
    trainer.iterate()
    before, info = learned(trainer), trainer.step.state()[1]
    on[0] = True
    with pytest.raises(UserError, match=r"not a finite number in iteration 2: lower training\.lr"):
        trainer.iterate()
    assert torch.equal(learned(trainer), before)
    assert trainer.step.state()[1] == info == {"step": 1, "old_is_current": True}


def test_an_iteration_that_is_stopped_leaves_no_trace(policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at any forward and done again, an iteration ends with the same bits."""
    config = quick(training={"clip": 1e-3})
    calls = Calls(policy, monkeypatch)
    trainer = make_trainer(policy, config)
    trainer.iterate()
    saved, info = snapshot(trainer)
    first = len(calls)
    trainer.iterate()
    forwards, expected = len(calls) - first, everything(policy)

    class Stop(BaseException):
        pass

    for stop_at in range(0, forwards, 3):
        left = [stop_at]

        def check(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise Stop

        again = make_trainer(policy, config, check=check)
        again.step.load_state(saved, info)
        before = everything(policy)
        with pytest.raises(Stop):
            again.iterate()
        assert torch.equal(everything(policy), before)
        assert policy.adapters.active == "current"
        again.iterate()
        assert torch.equal(everything(policy), expected), stop_at


class Memory:
    """An accelerator that holds `samples` at once."""

    def __init__(self, policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
        real = policy.predict

        def predict(x_t: Tensor, *args: Any) -> Tensor:
            if len(x_t) > samples:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(x_t, *args)

        monkeypatch.setattr(policy, "predict", predict)


def test_out_of_memory_halves_the_batch_says_so_once_and_changes_nothing(
    policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = snapshot(make_trainer(policy, quick()))
    trainer = make_trainer(policy, quick())
    for _ in range(2):
        trainer.iterate()
    expected = weights(policy, "current")
    told: list[str] = []
    small = make_trainer(policy, quick(), tell=told.append)
    small.step.load_state(*start)
    Memory(policy, monkeypatch, samples=5)
    for _ in range(2):
        small.iterate()
    assert told == [
        "Out of memory with 8 samples at once: going on with 4.",  # the roll-out
        "Out of memory with 16 samples at once: going on with 8.",  # the update, whose limit of 64 was never reached
        "Out of memory with 8 samples at once: going on with 4.",
    ]
    assert (small.step.rollout_batch, small.step.micro_batch) == (4, 4)
    # the same sums in another order, through two steps of AdamW
    assert distance(weights(policy, "current"), expected) < 1e-3


def test_where_one_sample_does_not_fit_its_activations_are_recomputed(
    policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = snapshot(make_trainer(policy, quick()))
    make_trainer(policy, quick()).iterate()
    expected = weights(policy, "current")
    told: list[str] = []
    small = make_trainer(policy, quick(training={"micro_batch": 2}), tell=told.append)
    small.step.load_state(*start)
    real = policy.predict

    def predict(x_t: Tensor, *args: Any) -> Tensor:
        if torch.is_grad_enabled() and not policy.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(x_t, *args)

    monkeypatch.setattr(policy, "predict", predict)
    try:
        small.iterate()
    finally:
        policy.disable_gradient_checkpointing()  # others use it, too
    assert told == [
        "Out of memory with 2 samples at once: going on with 1.",
        "Out of memory with 1 sample at once: from here on activations are computed a second time.",
    ]
    assert distance(weights(policy, "current"), expected) < 1e-3  # the same sums in another order, as above


def test_too_little_memory_for_one_sample_is_told(policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(policy, quick(), tell=lambda line: None)
    Memory(policy, monkeypatch, samples=0)
    with pytest.raises(UserError, match="memory is too small for one sample"):
        trainer.iterate()


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_loaded_state_goes_on_bit_for_bit(dropout: float, policy: DiffusersPolicy, sd3_folder: Path) -> None:
    if dropout:
        policy = load_policy(sd3_folder, rank=4, alpha=8.0, dropout=dropout)
    config = quick(rollout={"on_policy_steps": 2})
    trainer = make_trainer(policy, config)
    for _ in range(2):
        trainer.iterate()
    saved = snapshot(trainer)
    for _ in range(2):
        trainer.iterate()
    expected = learned(trainer)
    torch.rand(3)  # whatever happened between
    for name in ("current", "old", "ema"):
        moved(policy, name, seed=9)
    again = make_trainer(policy, config)
    again.step.load_state(*saved)
    for _ in range(2):
        again.iterate()
    assert torch.equal(learned(again), expected)
    assert again.iteration == 4


def test_the_same_seed_gives_the_same_run_and_another_another(sd3_folder: Path) -> None:
    """Dropout's masks included, whatever was drawn from torch's generator before."""
    policy = load_policy(sd3_folder, rank=4, alpha=8.0, dropout=0.3)
    start = snapshot(make_trainer(policy, quick()))
    ends = []
    for seed in (0, 0, 1):
        trainer = make_trainer(policy, quick(seed=seed))
        trainer.step.load_state(*start)
        torch.rand(1 + len(ends))
        trainer.iterate()
        ends.append(weights(policy, "current"))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_the_state_of_another_lora_is_told(policy: DiffusersPolicy) -> None:
    trainer = make_trainer(policy, quick())
    tensors, info = trainer.step.state()
    name = next(name for name in tensors if name.startswith("old/"))
    for bad in ({**tensors, name: torch.zeros(3, 3)}, {k: v for k, v in tensors.items() if k != name}):
        with pytest.raises(UserError, match="does not fit this model and LoRA"):
            trainer.step.load_state(bad, info)
