"""Each equation of the paper against numbers worked out by hand."""

import itertools
import math

import pytest
import torch

from dgpo_core.method import loss as L


def test_denoising_error_is_the_mean_square_over_each_sample() -> None:
    f = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 0.0]]]])
    target = torch.tensor([[[[0.0, 4.0]]], [[[3.0, 1.0]]]])
    assert L.denoising_error(f, target).tolist() == [2.5, 5.0]  # (1 + 4) / 2, (9 + 1) / 2


def test_the_guard_is_the_growth_of_the_norm_over_the_bases() -> None:
    f = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 2.0]]]], requires_grad=True)
    ratio = L.norm_ratio(f, torch.tensor([[[[0.0, 4.0]]], [[[4.0, 0.0]]]]))
    assert ratio.tolist() == [1.25, 0.5]
    assert L.growth(ratio).tolist() == [0.25, 0.0]
    L.growth(ratio).sum().backward()
    assert f.grad is not None
    assert f.grad.flatten().tolist() == pytest.approx([3 / 5 / 4, 4 / 5 / 4, 0.0, 0.0])  # along f, where it has grown


def test_group_logit_is_beta_over_G_times_the_advantage_weighted_change_of_error() -> None:
    A = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    d, d_ref = torch.tensor([[0.5, 0.7], [0.1, 0.1]]), torch.tensor([[0.6, 0.5], [0.2, 0.4]])
    # group 1: 10/2 * (1*-0.1 + -1*0.2) = -1.5; group 2: 10/2 * (2*-0.1 + -2*-0.3) = 2.0
    assert L.group_logit(A, d, d_ref, beta=10.0).tolist() == pytest.approx([-1.5, 2.0], rel=1e-6)


def test_group_loss_is_minus_log_sigmoid_of_minus_the_logit() -> None:
    found = L.group_loss(torch.tensor([0.0, -1.5, 2.0])).tolist()
    assert found == pytest.approx([math.log(2), math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(2.0))], rel=1e-6)


def test_official_weight_is_sigmoid_times_advantage_and_the_paper_weight_beta_times_that() -> None:
    s, A = torch.tensor([0.0, math.log(3)]), torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    assert L.gradient_weight(s, A, 10.0, "official").flatten().tolist() == pytest.approx([0.5, -0.5, 1.5, -1.5])
    assert L.gradient_weight(s, A, 10.0, "paper").flatten().tolist() == pytest.approx([5.0, -5.0, 15.0, -15.0])


@pytest.mark.parametrize("beta", [1.0, 10.0, 100.0])
def test_the_surrogate_has_the_gradient_of_the_group_loss(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    r, d_ref = torch.randn(3, 5, generator=generator), torch.rand(3, 5, generator=generator)
    A = r - r.mean(1, keepdim=True)
    d = (d_ref + 0.1 * torch.randn(3, 5, generator=generator)).double().requires_grad_()
    A, d_ref = A.double(), d_ref.double()
    s = L.group_logit(A, d, d_ref, beta)
    (exact,) = torch.autograd.grad(L.group_loss(s).mean(), d, retain_graph=True)
    (found,) = torch.autograd.grad(L.surrogate(L.gradient_weight(s, A, beta, "paper"), d), d)
    assert torch.allclose(found, exact, rtol=1e-12, atol=0)  # the same expression in double precision
    (official,) = torch.autograd.grad(L.surrogate(L.gradient_weight(s, A, beta, "official"), d), d)
    assert torch.allclose(official * beta, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("A", "ratio", "kept"),
    [
        (1.0, 1.2, False),  # preferred, and already much likelier than under the old policy
        (1.0, 1.05, True),
        (1.0, 0.5, True),  # preferred but less likely: must be free to recover
        (-1.0, 0.8, False),  # rejected, and already much less likely
        (-1.0, 0.95, True),
        (-1.0, 1.5, True),
        (0.0, 0.8, False),  # A = 0 belongs to the negative group
        (0.0, 1.5, True),
    ],
)
def test_clip_stops_a_sample_only_in_the_direction_it_is_pushed(A: float, ratio: float, kept: bool) -> None:
    d = torch.tensor([0.3])
    d_old = d + math.log(ratio)  # ratio = exp(d_old - d)
    assert L.unclipped(torch.tensor([A]), d, d_old, clip=0.1).tolist() == [kept]


def test_swapping_the_rewards_of_two_samples_flips_the_update() -> None:
    x = torch.tensor([[0.2, 0.9]], requires_grad=True)
    d = x.square()
    s = torch.zeros(1)
    (one,) = torch.autograd.grad(L.surrogate(L.gradient_weight(s, torch.tensor([[1.0, -1.0]]), 1.0, "official"), d), x)
    d = x.square()
    (two,) = torch.autograd.grad(L.surrogate(L.gradient_weight(s, torch.tensor([[-1.0, 1.0]]), 1.0, "official"), d), x)
    assert torch.equal(one, -two)


def test_two_arms_the_mean_moves_to_the_rewarded_one() -> None:
    """A model that predicts one number for samples at +1 and -1: only +1 is rewarded, so the number must rise to it."""
    mean = torch.zeros((), requires_grad=True)
    arms = torch.tensor([[1.0, -1.0]])
    A = torch.tensor([[1.0, -1.0]])
    d_ref = arms.square()  # the reference predicts 0
    means = [0.0]
    for _ in range(50):
        d = (arms - mean).square()
        weight = L.gradient_weight(L.group_logit(A, d, d_ref, 1.0), A, 1.0, "paper")
        (slope,) = torch.autograd.grad(L.surrogate(weight, d), mean)
        mean = (mean - 0.1 * slope).detach().requires_grad_()
        means.append(mean.item())
    assert all(b > a for a, b in itertools.pairwise(means))
    # the logit is s = 1/2 (-2 mean - 2 mean) = -2 mean, its loss -log sigmoid(2 mean): still pulling, ever more weakly
    assert means[1] == pytest.approx(0.1 * 0.5 * 2)
    assert means[-1] > 1.0
