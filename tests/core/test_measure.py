"""How a gain is measured: the same images for every adapter, from seeds that no training has seen."""

import math
from typing import Any

import pytest
import torch
from bright import Bright, Red
from engine import SIZE, make_trainer, moved, quick
from torch import Tensor

from dgpo_core.common.distributed import World
from dgpo_core.common.prompts import Prompt
from dgpo_core.evaluation import held_out
from dgpo_core.evaluation.held_out import Drawing, HeldOut, evaluation_set
from dgpo_core.evaluation.scores import Measurement, evaluation_weights, total
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.rewards.statistics import JpegSize
from dgpo_core.runs import assemble
from dgpo_core.settings.config import Config, EvalConfig, RewardTerm

HELD_OUT = [Prompt("blue red"), Prompt("red red"), Prompt("two")]


def test_mean_and_95_percent_interval_by_hand() -> None:
    found = Measurement.of(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    # sample variance (0.75^2 + 3 * 0.25^2) / 3 = 0.25, so 1.96 * 0.5 / 2
    assert found.mean == 0.75
    assert found.ci95 == pytest.approx((0.75 - 0.49, 0.75 + 0.49))
    assert found.n == 4
    assert found.as_json() == {"mean": 0.75, "ci95": list(found.ci95), "n": 4}


def test_one_image_has_no_interval() -> None:
    assert Measurement.of(torch.tensor([0.3])).ci95 == pytest.approx((0.3, 0.3))


def test_the_interval_covers_the_truth_95_times_in_100() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = (torch.rand(1000, 400, generator=generator) < 0.6).float()
    inside = [low <= 0.6 <= high for low, high in (Measurement.of(row).ci95 for row in draws)]
    assert sum(inside) == pytest.approx(950, abs=3 * math.sqrt(1000 * 0.95 * 0.05))


@pytest.mark.parametrize("images", [1, 2, 3, 7, 12])
def test_the_images_are_spread_evenly_over_the_prompts(images: int) -> None:
    rows = evaluation_set(HELD_OUT, images)
    counts = [len(seeds) for _, seeds in rows]
    assert sum(counts) == images
    assert max(counts) - min(counts) <= 1
    assert [prompt for prompt, _ in rows] == HELD_OUT[: len(rows)]
    seeds = [seed for _, row in rows for seed in row]
    assert len(set(seeds)) == images


def test_more_images_keep_those_there_were() -> None:
    few, many = evaluation_set(HELD_OUT, 3), evaluation_set(HELD_OUT, 9)
    assert all(b[: len(a)] == a for (_, a), (_, b) in zip(few, many[: len(few)], strict=True))


def test_training_never_uses_a_seed_of_the_evaluation(policy: DiffusersPolicy) -> None:
    trained = set()
    for seed in (0, 1):
        trainer = make_trainer(policy, quick(seed=seed))
        trained |= {s for _ in range(2) for group in trainer.iterate().groups for s in group.seeds}
    assert not trained & {s for _, row in evaluation_set(HELD_OUT, 2000) for s in row}


def test_base_and_adapter_are_measured_on_the_same_noise(policy: DiffusersPolicy) -> None:
    moved(policy, "current", seed=1)
    drawing, rows = Drawing.of(policy, quick(), SIZE), evaluation_set(HELD_OUT, 6)
    base, again, current = (drawing.draw(adapter, rows) for adapter in (None, None, "current"))
    assert [group.seeds for group in base] == [group.seeds for group in current]
    assert all(torch.equal(a.images, b.images) for a, b in zip(base, again, strict=True))
    assert not any(torch.equal(a.images, b.images) for a, b in zip(base, current, strict=True))
    assert policy.adapters.active == "current"


def test_a_measurement_is_the_mean_reward_of_its_images(policy: DiffusersPolicy) -> None:
    config = quick(reward={"bright": 2.0, "red": -1.0})
    rewards = {"bright": Bright(), "red": Red()}
    held_out = HeldOut.of(config, policy, HELD_OUT, rewards, SIZE, World("cpu"))
    found = held_out.measure(None, 7, evaluation_weights(config))
    images = torch.cat([group.images for group in held_out.drawing.draw(None, evaluation_set(HELD_OUT, 7))])
    expected = 2 * images.mean((1, 2, 3)) - images[:, 0].mean((1, 2))
    assert found.mean == pytest.approx(expected.mean().item(), abs=1e-6)
    assert found.n == 7


def test_the_share_of_many_processes_gives_the_same_number(policy: DiffusersPolicy) -> None:
    class Of(World):
        def __init__(self, rank: int) -> None:
            self.rank, self.size, self.device = rank, 2, torch.device("cpu")

        def gather(self, mine: list[torch.Tensor]) -> list[torch.Tensor]:
            return mine

    def of(world: World) -> Measurement:
        held_out = HeldOut.of(quick(), policy, HELD_OUT, {"bright": Bright()}, SIZE, world)
        return held_out.measure(None, 6, {"bright": 1.0})

    whole, parts = of(World("cpu")), [of(Of(rank)) for rank in (0, 1)]
    assert [part.n for part in parts] == [4, 2]
    assert sum(part.mean * part.n for part in parts) / 6 == pytest.approx(whole.mean, abs=1e-6)


def test_where_memory_runs_out_no_judge_is_asked_twice_and_it_is_told_once(
    policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Paid(Bright):
        def score(self, images: Tensor, *about: Any) -> Tensor:
            asked.append(len(images))
            return super().score(images, *about)

    real, left = policy.decode, [1]

    def decode(latents: Tensor) -> Tensor:
        """Another program has taken the memory after the first picture was judged."""
        if len(latents) > 1 and not left:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        left.clear()
        return real(latents)

    monkeypatch.setattr(policy, "decode", decode)
    monkeypatch.setattr(held_out, "PART", 1)  # every prompt is a part of its own
    told: list[str] = []
    measured = HeldOut.of(quick(), policy, HELD_OUT, {"bright": Paid()}, SIZE, World("cpu"), tell=told.append)
    found = measured.score(None, 6)
    assert asked == [2, 2, 2]
    assert told == ["Out of memory with 2 samples at once: going on with 1."]
    measured.score(None, 6)
    assert len(told) == 1
    assert len(found) == 6


def test_the_gain_is_measured_by_the_reward_that_is_named_else_by_the_trained_sum() -> None:
    assert evaluation_weights(quick(reward={"bright": 2.0, "red": 0.5})) == {"bright": 2.0, "red": 0.5}
    assert evaluation_weights(quick(evaluation={"reward": "red"})) == {"red": 1.0}


def test_the_total_of_a_group_is_the_weighted_sum(policy: DiffusersPolicy) -> None:
    (group,) = Drawing.of(policy, quick(), SIZE).draw(None, evaluation_set(HELD_OUT[:1], 2))
    group = group.scored({"bright": torch.tensor([1.0, 2.0]), "red": torch.tensor([3.0, 5.0])})
    assert total(group, {"bright": 2.0, "red": -1.0}).tolist() == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("solver", "asked"), [("", ("euler", "karras")), ("euler", ("euler", "karras")), ("heun", ("heun", ""))]
)
def test_the_roll_outs_scheduler_goes_with_its_solver(
    solver: str, asked: tuple[str, str], policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick(rollout={"solver": "euler", "scheduler": "karras"}, evaluation={"solver": solver, "steps": 5})
    seen = []
    monkeypatch.setattr(policy, "solver", lambda name, steps, *size, scheduler: seen.append((name, scheduler, steps)))
    Drawing.of(policy, config, SIZE)
    assert seen == [(*asked, 5)]


def test_what_measures_the_gain_has_the_options_that_it_is_watched_with() -> None:
    options = {"quality": 30}
    config = Config(watch=(RewardTerm("jpeg_size", 1.0, options),), evaluation=EvalConfig(reward="jpeg_size"))
    (judge,) = assemble.evaluation_rewards(config, {}, "cpu").values()
    assert isinstance(judge, JpegSize)
    assert judge.quality == 30
