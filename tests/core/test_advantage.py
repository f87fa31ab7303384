"""Rewards to advantages, by hand."""

import pytest
import torch

from dgpo_core.method import advantage as adv

R = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 8.0]])


def test_group_advantage_divides_by_the_groups_own_deviation() -> None:
    # group 1: mean 2, population std sqrt(2/3); group 2: mean 6, std sqrt(2)
    a, b = 1 / ((2 / 3) ** 0.5 + 1e-4), 1 / (2**0.5 + 1e-4)
    assert adv.group_advantage(R).flatten().tolist() == pytest.approx([-a, 0, a, -b, -b, 2 * b], rel=1e-5)


def test_global_advantage_divides_by_the_deviation_of_all_samples() -> None:
    # all six: mean 4, squares 9+4+1+1+1+16 = 32, population variance 32/6; the means stay those of the groups
    std = (32 / 6) ** 0.5 + 1e-4
    assert adv.global_advantage(R).flatten().tolist() == pytest.approx(
        [-1 / std, 0, 1 / std, -1 / std, -1 / std, 2 / std], rel=1e-5
    )


def test_global_advantage_counts_the_samples_of_other_processes() -> None:
    whole = adv.global_advantage(R)
    assert torch.equal(adv.global_advantage(R[:1], everyone=R), whole[:1])


@pytest.mark.parametrize("rule", [adv.group_advantage, adv.global_advantage])
def test_advantages_of_a_group_sum_to_zero(rule) -> None:
    r = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    # 24 float32 terms of size 1: rounding is some 1e-6
    assert rule(r).sum(1).abs().max() < 1e-5


def test_clamp_limits_both_sides() -> None:
    assert adv.clamp(torch.tensor([-9.0, -1.0, 7.0]), 5.0).tolist() == [-5.0, -1.0, 5.0]


def test_a_group_of_equal_rewards_is_not_informative() -> None:
    r = torch.tensor([[0.3, 0.3, 0.3], [0.3, 0.3, 0.4]])
    assert adv.informative(r).tolist() == [False, True]


@pytest.mark.parametrize("rule", [adv.group_advantage, adv.global_advantage])
@pytest.mark.parametrize("value", [0.0865, 85.9039, 970.4255])
def test_equal_rewards_have_no_advantage_however_large_they_are(rule, value: float) -> None:
    """Where advantages of several rewards are added, it would count for all of the group."""
    assert not rule(torch.full((1, 12), value)).any()
