"""A base in float16: what is learned there is what is learned in float32."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import accumulate, distance, gradient, make_tasks, moved, quick
from torch import Tensor

from dgpo_core.method import update as update_of
from dgpo_core.method.half import loss_scale
from dgpo_core.method.rollout import nothing
from dgpo_core.method.update import Task, Update
from dgpo_core.policy import load_policy
from dgpo_core.policy.pipeline import DiffusersPolicy

# The tiny model's gradient in float16 differs from the one in float32 by 0.005; in bfloat16 by 0.02.
CLOSE = 0.02
MANY = 2_000
"""Groups and timesteps of an update, so that float16 does not hold its derivatives: as fewer of larger images."""


@pytest.fixture(scope="module")
def halves(sd3_folder: Path) -> DiffusersPolicy:
    return load_policy(sd3_folder, rank=4, alpha=8.0, dtype="float16", device="cpu")


def of_many(policy: DiffusersPolicy, tasks: Sequence[Task], micro_batch: int = 64) -> Tensor:
    """The gradient of a few out of `MANY` tasks."""
    settings = quick(training={"clip": 0.0, "kl_weight": 0.1}).training
    update = Update(policy, settings, uncond=None, old_is_current=True, check=nothing)
    update.accumulate(tasks, MANY, micro_batch)
    return gradient(policy)


@pytest.mark.parametrize("micro_batch", [64, 3])
def test_a_gradient_in_float16_does_not_vanish(
    micro_batch: int, halves: DiffusersPolicy, policy: DiffusersPolicy
) -> None:
    for each in (halves, policy):
        moved(each, "current", seed=1)
    exact = of_many(policy, make_tasks(policy), micro_batch)
    assert distance(of_many(halves, make_tasks(halves), micro_batch), exact) < CLOSE


def test_where_the_scale_was_too_large_a_smaller_one_gives_the_gradient(
    halves: DiffusersPolicy, policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (halves, policy):
        moved(each, "current", seed=1)
    exact = of_many(policy, make_tasks(policy))
    monkeypatch.setattr(update_of, "loss_scale", lambda dtype, numbers: 2.0**40)
    assert distance(of_many(halves, make_tasks(halves)), exact) < CLOSE


def test_a_loss_that_is_no_number_is_not_tried_at_every_scale(
    halves: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, tried = make_tasks(halves), []
    real = Update._accumulate
    monkeypatch.setattr(Update, "_accumulate", lambda self, *args: tried.append(0) or real(self, *args))
    tasks[0].group.latents.fill_(float("nan"))
    _, tally = accumulate(halves, tasks, quick().training)
    assert math.isnan(tally.loss)
    assert len(tried) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_with_the_range_of_float32_are_not_scaled(dtype: Any) -> None:
    assert loss_scale(dtype, 1e9) == 1.0


def test_the_scale_is_a_power_of_two_so_that_dividing_by_it_rounds_nothing() -> None:
    assert loss_scale(torch.float16, 24 * 65_536 * 32.0) == 2.0**22
    assert loss_scale(torch.float16, 0.5) == 1.0
