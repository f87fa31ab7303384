"""What holds a policy to its base: the KL term's weight, steered to a target, and the guard of the norm."""

from dataclasses import replace

import pytest
import torch
from engine import accumulate, distance, everything, make_tasks, make_trainer, moved, quick, snapshot
from torch import equal

from dgpo_core.common.errors import UserError
from dgpo_core.method import loss as L
from dgpo_core.method.kl import LEAST, first_weight, next_weight
from dgpo_core.method.update import Rows
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.settings.config import Config, TrainingConfig


def target(distance: float, weight: float = 0.01) -> TrainingConfig:
    return replace(quick().training, kl_target=distance, kl_weight=weight)


def test_the_weight_follows_the_distance_at_most_by_a_factor_of_two_and_not_below_the_first() -> None:
    t = target(0.2)
    assert next_weight(t, 0.1, 0.2) == pytest.approx(0.1)
    assert next_weight(t, 0.1, 0.3) == pytest.approx(0.1 * 1.5**0.3)
    assert next_weight(t, 0.1, 5.0) == pytest.approx(0.2)
    assert next_weight(t, 0.1, 0.15) == pytest.approx(0.1 * 0.75**0.3)
    assert next_weight(t, 0.1, 0.0) == pytest.approx(0.05)
    assert next_weight(t, 0.015, 0.0) == 0.01
    assert next_weight(t, 0.1, None) == 0.1  # nobody asked the base


def test_without_a_weight_it_begins_at_the_least_and_without_a_target_it_stays() -> None:
    assert first_weight(target(0.2, weight=0.0)) == LEAST
    assert first_weight(target(0.0, weight=0.0)) == 0.0
    assert first_weight(target(0.0, weight=0.5)) == 0.5


def steered(kl_target: float) -> Config:
    return quick(training={"kl_weight": 0.01, "kl_target": kl_target, "lr": 1e-2})


@pytest.mark.slow
def test_a_training_with_a_target_ends_nearer_to_the_base(policy: DiffusersPolicy) -> None:
    start = snapshot(make_trainer(policy, steered(0.0)))

    def last(kl_target: float) -> float:
        trainer = make_trainer(policy, steered(kl_target))
        trainer.step.load_state(*start)
        return [trainer.iterate().metrics["kl"] for _ in range(12)][-1]

    free = last(0.0)
    assert last(free / 8) < free / 2


def test_a_steered_training_goes_on_bit_for_bit(policy: DiffusersPolicy) -> None:
    config = steered(1e-6)
    trainer = make_trainer(policy, config)
    for _ in range(3):
        trainer.iterate()
    tensors, info = snapshot(trainer)
    assert info["kl_weight"] > 0.01  # of a distance far beyond the target
    last, expected = trainer.iterate(), everything(policy)
    again = make_trainer(policy, config)
    again.step.load_state(tensors, info)
    assert again.iterate().metrics == last.metrics
    assert equal(everything(policy), expected)


@pytest.mark.parametrize("weight", [float("nan"), -1.0, "much"])
def test_a_state_with_a_weight_that_is_none_is_refused(weight: object, policy: DiffusersPolicy) -> None:
    trainer = make_trainer(policy, steered(0.1))
    tensors, info = snapshot(trainer)
    with pytest.raises(UserError, match="does not hold the state of a training"):
        trainer.step.load_state(tensors, {**info, "kl_weight": weight})


# --- the guard -------------------------------------------------------------------------------------------------------


def guarded_by(weight: float) -> TrainingConfig:
    return replace(quick().training, beta=300.0, clip=0.0, kl_weight=0.0, norm_guard=weight)


def test_the_guard_pulls_at_what_has_grown_and_the_norm_is_told(policy: DiffusersPolicy) -> None:
    """The adapters of this seed have some predictions larger than the base's and some smaller."""
    moved(policy, "current", seed=1)
    tasks = make_tasks(policy)
    without, tally = accumulate(policy, tasks, guarded_by(0.0))
    guarded, told = accumulate(policy, tasks, guarded_by(0.5))
    assert distance(guarded, without) > 1e-3  # a matter of rounding is 1e-6
    rows = Rows.of(tasks, policy)
    with torch.no_grad():
        f = policy.predict(rows.x_t, rows.t, rows.cond)
        with policy.using(None):
            ratio = L.norm_ratio(f, policy.predict(rows.x_t, rows.t, rows.cond))
    assert L.growth(ratio).gt(0).any()
    assert told.means()["norm_ratio"] == pytest.approx(ratio.mean().item(), rel=1e-4)
    assert tally.means()["norm_ratio"] == pytest.approx(ratio.mean().item(), rel=1e-4)  # the logit asks the base, too
