"""The comparison with other methods: each one's equations by hand, what an iteration of each costs, the command."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine import weights
from torch import Tensor, tensor
from torch.distributions import Normal, kl_divergence

from dgpo_core.benchmark import compare, results
from dgpo_core.benchmark.methods import METHODS, awm, flow_awr, nft, sde, v_grpo
from dgpo_core.benchmark.methods.equations import adaptive_error, clipped_loss, stratified
from dgpo_core.benchmark.race import Contest, Cost, Point, Race
from dgpo_core.common.errors import UserError
from dgpo_core.settings.config import Config, RewardTerm
from dgpo_core.settings.presets import load_preset

# --- equations -------------------------------------------------------------------------------------------------------


def near(found: Tensor, *expected: float) -> bool:
    return torch.allclose(found.flatten(), tensor(expected), atol=1e-5)


def test_the_adaptive_error_is_the_square_over_the_absolute_error_without_its_gradient() -> None:
    x = tensor([[1.0, 3.0]], requires_grad=True)
    error = adaptive_error(x, tensor([[0.0, 0.0]]), tensor([[0.0, 1.0]]))
    assert near(error, (1 + 9) / 2 / 1.5)
    error.sum().backward()
    assert x.grad is not None
    assert near(x.grad, 1 / 1.5, 3 / 1.5)  # of the square alone


def test_the_clip_stops_a_sample_only_on_the_side_that_it_is_pushed_to() -> None:
    log_ratio = tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    loss = clipped_loss(tensor([1.0, -1.0, 1.0, -1.0]), log_ratio, 0.2)
    assert near(loss, -1.2, 1.5, -0.5, 0.8)
    loss.sum().backward()
    assert log_ratio.grad is not None
    assert near(log_ratio.grad, 0.0, 1.5, -0.5, 0.0)


def test_strata_have_one_level_of_each_part_and_depend_on_the_seed() -> None:
    levels = torch.arange(8.0).flip(0)
    drawn = [stratified(levels, 4, seed) for seed in range(30)]
    assert all([int(x // 2) for x in row] == [3, 2, 1, 0] for row in drawn)
    assert len({tuple(row) for row in drawn}) > 5


def test_nft_weighs_the_two_implicit_velocities_by_how_good_a_sample_is() -> None:
    assert near(nft.optimality(tensor([0.0, 2.5, -2.5, 9.0])), 0.5, 0.75, 0.25, 1.0)
    plus, minus = nft.implicit(tensor([3.0]), tensor([1.0]), 0.5)
    assert near(plus, 2.0)
    assert near(minus, 0.0)
    assert near(nft.contrast(tensor([0.75]), tensor([0.2]), tensor([0.4]), 0.5), 5 * (0.75 * 0.2 + 0.25 * 0.4) / 0.5)


def test_nft_pulls_to_good_samples_and_pushes_from_bad_ones() -> None:
    def pull(r: float) -> float:
        v, target = tensor([[1.0]], requires_grad=True), tensor([[4.0]])
        plus, minus = nft.implicit(v, v.detach(), 1.0)
        good, bad = ((side - target).square().mean(1) for side in (plus, minus))
        nft.contrast(tensor([r]), good, bad, 1.0).sum().backward()
        assert v.grad is not None
        return -v.grad.item()

    assert pull(1.0) > 0 > pull(0.0)
    assert pull(0.5) == pytest.approx(0)


def test_awm_takes_the_quarter_power_of_the_error_times_the_noise_level_for_the_likelihood() -> None:
    found = awm.log_likelihood(tensor([0.0625, 0.0]), tensor([0.5, 0.5]))
    assert near(found, -0.5 * (0.5 - 10**-2.5) / 0.25, 0.0)


def test_flow_awr_moves_the_target_by_the_energy_of_a_sample() -> None:
    e = flow_awr.energy(tensor([[math.log(3), 0.0], [0.0, 0.0]]))  # softmax 3/4 and 1/4
    assert near(e, 0.25 / 0.2501, -0.25 / 0.2501, 0.0, 0.0)
    assert near(flow_awr.energy(tensor([[0.004, 0.0]])), 0.1, -0.1)  # a deviation of 0.001 counts as 0.01
    x0_old, x0 = tensor([[1.0], [1.0]]), tensor([[3.0], [3.0]])
    assert near(flow_awr.rectified(x0_old, x0, tensor([2.0, -0.5])), 5.0, 0.0)


def test_v_grpo_takes_the_mean_over_the_timesteps_for_the_likelihood() -> None:
    assert near(v_grpo.surrogate([tensor([1.0, 2.0]), tensor([3.0, 0.0])]), -2.0, -1.0)


def test_a_step_of_the_sde_by_hand() -> None:
    assert sde.diffusion(0.5, 0.9, 0.7) == pytest.approx(0.7)
    assert sde.diffusion(1.0, 0.9, 0.7) == pytest.approx(0.7 * math.sqrt(10))
    mean, std = sde.sde_step(tensor([2.0]), tensor([1.0]), 0.5, 0.25, 0.7)
    assert near(mean, 2 - 0.25 * (1 + 0.49 * 2.5))
    assert std == pytest.approx(0.35)


def test_the_sdes_log_probability_and_kl_are_those_of_gaussians() -> None:
    x, mean, other = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    expected = Normal(mean, 0.3).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(sde.log_prob(x, mean, 0.3), expected)
    torch.testing.assert_close(
        sde.kl(mean, other, 0.3), kl_divergence(Normal(mean, 0.3), Normal(other, 0.3)).mean((1, 2, 3))
    )


@pytest.mark.parametrize("s", [0.2, 0.5, 0.9])
def test_the_sde_leaves_the_marginals_as_the_ode_has_them(s: float) -> None:
    """Where all pictures are 0, x_t is s eps: its deviation is s, and after the step s_next, whatever sigma is."""
    dt, sigma = 1e-4, sde.diffusion(s, 0.9, 0.7)
    x = tensor([s], dtype=torch.float64)  # one deviation
    mean, std = sde.sde_step(x, x / s, s, s - dt, sigma)
    assert math.hypot(mean.item(), std) == pytest.approx(s - dt, abs=1e-7)


# --- an iteration of each ------------------------------------------------------------------------------------------


def small(seed: int = 0) -> Config:
    """The quickstart with 2 groups of 4, and a reward that is never equal for two pictures."""
    preset = load_preset("quickstart", Config())
    data, rollout = replace(preset.data, groups_per_iteration=2), replace(preset.rollout, group_size=4)
    return replace(preset, seed=seed, data=data, rollout=rollout, reward=(RewardTerm("jpeg_size"),))


# 8 samples in 8 steps are 64 forwards; 4 timesteps of 8 samples are 32
FORWARDS_AND_BACKWARDS = {
    "dgpo": (64 + 2 * 32, 32),  # base, current
    "nft": (64 + 3 * 32, 32),  # old, base, current
    "awm": (64 + 3 * 32, 32),
    "flow_awr": (64 + 3 * 32, 32),
    "v_grpo": (64 + 16 + 32, 32),  # old only for the second half
    "flow_grpo_fast": (64 + 2 * 8, 2 * 8),  # two steps
    "flow_grpo": (64 + 7 * 2 * 8, 7 * 8),  # seven steps, base and current
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_an_iteration_moves_the_adapter_and_costs_the_forwards_that_were_worked_out(method: str) -> None:
    contest = Contest(method, small(), images=2)
    before = {name: weights(contest.policy, name) for name in ("current", "ema")}
    cost = contest.iterate()
    assert (cost.forwards, cost.backwards) == FORWARDS_AND_BACKWARDS[method]
    assert cost.seconds > 0
    for name in ("current", "ema"):
        assert not torch.equal(weights(contest.policy, name), before[name])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_edits_are_raced_as_well(method: str) -> None:
    preset = load_preset("quickstart-edits", Config())
    data, rollout = replace(preset.data, groups_per_iteration=1), replace(preset.rollout, group_size=4)
    config = replace(preset, data=data, rollout=rollout, reward=(RewardTerm("jpeg_size"),))
    contest = Contest(method, config, images=2)
    before = weights(contest.policy, "current")
    contest.iterate()
    assert not torch.equal(weights(contest.policy, "current"), before)
    assert results.title(contest.race) == f"{METHODS[method].what}, groups of 4, quickstart-edits"


@pytest.mark.slow
def test_all_methods_but_those_of_an_sde_begin_with_the_same_pictures() -> None:
    def first(method: str) -> Tensor:
        contest = Contest(method, small(), images=2)
        seen: list[Tensor] = []
        contest.policy.network.register_forward_hook(lambda module, given, found: seen.append(found[0].detach()))
        contest.iterate()
        return seen[7]  # the last step of the roll-out

    ours = first("dgpo")
    assert all(torch.equal(first(method), ours) for method in ("nft", "v_grpo"))


@pytest.mark.slow
def test_evaluations_are_no_part_of_the_cost() -> None:
    contest = Contest("v_grpo", small(), images=4)
    first, last = list(contest.run(1, lambda iterations, passes: iterations >= 1, lambda point: False))[-1].points
    assert first.cost == Cost()
    assert last.cost.forwards == FORWARDS_AND_BACKWARDS["v_grpo"][0]
    assert contest.counter.forwards == last.cost.forwards + 2 * 4 * 8  # two evaluations of 4 images in 8 steps


# --- results ---------------------------------------------------------------------------------------------------------


def race(method: str, seed: int, *success: float) -> Race:
    """Each iteration costs 10 seconds and 2000 passes."""
    points = [Point(i, Cost(10.0 * i, 1500 * i, 500 * i), s) for i, s in enumerate(success)]
    return Race(method, seed, 1e-3, 16, tuple(points))


def test_the_cost_to_a_success_is_that_of_the_first_evaluation_at_or_above_it() -> None:
    found = race("dgpo", 0, 0.45, 0.80, 0.91, 0.89, 0.95)
    assert [found.first(mark) for mark in results.MARKS] == [found.points[i].cost for i in (1, 2, 4)]
    assert found.first(0.96) is None
    assert found.best == 0.95
    assert results.table([found]).splitlines()[2] == (
        "| DGPO | 0.001 | 0 | 10 s, 2 k | 20 s, 4 k | 40 s, 8 k | 0.950 | 40 s, 8 k |"
    )


def test_races_survive_their_file_and_other_files_are_refused(tmp_path: Path) -> None:
    races = [race("dgpo", 0, 0.4, 0.5), race("flow_grpo", 1, 0.4)]
    file = tmp_path / "races.json"
    file.write_text(json.dumps(results.as_json(races)))
    assert results.read(file) == races
    for other in ('{"a": 1}', '[{"method": "dgpo"}]', '[{"method": "x", "points": []}]', "[1]"):
        file.write_text(other)
        with pytest.raises(UserError, match="does not hold races"):
            results.read(file)


@pytest.mark.slow
def test_the_picture_holds_the_mean_of_the_seeds_up_to_the_shortest() -> None:
    x, y = results._means([race("dgpo", 0, 0.4, 0.6, 0.8), race("dgpo", 1, 0.4, 0.4)], "seconds")
    assert (x[0], x[-1]) == (0.0, 10.0)
    assert y[-1] == pytest.approx([0.6, 0.4])
    assert results.plot([race("dgpo", 0, 0.4, 0.6), race("nft", 0, 0.4, 0.5)]).startswith(b"\x89PNG")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    """The command leaves torch with one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_the_command_compares_two_methods_and_goes_on_from_their_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "races.json", tmp_path / "races.png"
    arguments = ["--methods", "dgpo", "v_grpo", "--iterations", "1", "--images", "4", "--lr", "1e-3"]
    assert compare.main([*arguments, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "DGPO, lr 0.001, seed 0" in printed
    assert [(found.method, [p.iteration for p in found.points]) for found in results.read(file)] == [
        ("dgpo", [0, 1]),
        ("v_grpo", [0, 1]),
    ]
    assert compare.main(["--iterations", "0", "--load", str(file), "--plot", str(picture)]) == 0
    assert capsys.readouterr().out.strip() == printed[printed.index("| method") :].strip()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--methods", "ngt"], "There is no method 'ngt', did you mean nft?"),
        (["--group_size", "1"], "--group_size is 1 but must be at least 2."),
        (["--iterations", "0"], "There is nothing to compare"),
    ],
)
@pytest.mark.usefixtures("threads")
def test_options_that_cannot_work_are_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(arguments) == 2
    assert told in capsys.readouterr().err
