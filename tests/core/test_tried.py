"""What was tried to learn from less: variants are the settings that they say, and the changes that they say."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine import weights
from torch import tensor

from dgpo_core.benchmark import held_back, tried
from dgpo_core.benchmark.held_back import Held, smooth
from dgpo_core.benchmark.methods.dgpo import DGPO
from dgpo_core.benchmark.race import Contest, Cost, Point, Race
from dgpo_core.benchmark.variants import VARIANTS, Explore, TwoEpochs, TwoHalves, extremes, laid_over, ranks, variant
from dgpo_core.common.errors import UserError
from dgpo_core.settings.config import Config
from dgpo_core.settings.presets import load_preset
from dgpo_core.settings.validation import validate

QUICKSTART = load_preset("quickstart", Config())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_settings_that_can_work(name: str) -> None:
    found = laid_over(variant(name), QUICKSTART, 3)
    validate(replace(found, name="x"))
    assert (found == replace(QUICKSTART, seed=3)) == (not any(variant(name).settings.values()))


def test_variants_are_laid_over_each_other() -> None:
    both = laid_over(variant("groups_of_8+lr_2e-3+timesteps_2"), QUICKSTART, 0)
    assert (both.rollout.group_size, both.training.lr, both.training.timesteps) == (8, 2e-3, 2)
    assert both.rollout.steps == QUICKSTART.rollout.steps
    assert variant("explore+groups_of_8").entrant is Explore


@pytest.mark.parametrize(
    ("name", "told"), [("groups_of_7", "There is no variant 'groups_of_7'"), ("muon+ranked", "only one may be more")]
)
def test_what_cannot_be_joined_is_told(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        variant(name)


def test_ranks_count_who_is_worse_and_ties_share() -> None:
    assert ranks(tensor([0.1, 0.9, 0.5, 0.5])).tolist() == [0.0, 3.0, 1.5, 1.5]


def test_the_extremes_are_as_many_best_as_worst() -> None:
    assert extremes(tensor([0.3, 0.9, 0.1, 0.5, 0.7, 0.2]), 4) == [1, 2, 4, 5]


def small(name: str) -> Config:
    config = laid_over(variant(name), QUICKSTART, 0)
    return replace(
        config,
        data=replace(config.data, groups_per_iteration=2),
        rollout=replace(config.rollout, group_size=4),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, one in VARIANTS.items() if one.entrant is not DGPO])
def test_what_is_more_than_settings_moves_the_adapter(name: str) -> None:
    contest = Contest(name, small(name), images=2, entrant=variant(name).entrant)
    before = weights(contest.policy, "current")
    contest.iterate()
    assert not torch.equal(weights(contest.policy, "current"), before)


@pytest.mark.slow
@pytest.mark.parametrize(("entrant", "steps"), [(TwoHalves, 2), (TwoEpochs, 2), (Explore, 1)])
def test_so_many_steps_are_taken_of_a_roll_out(entrant: type, steps: int) -> None:
    contest = Contest("x", small("quickstart"), images=2, entrant=entrant)
    cost = contest.iterate()
    assert contest.method.trainer.iteration == steps  # type: ignore[attr-defined]
    drawn = {TwoHalves: 8 * 8, TwoEpochs: 8 * 8, Explore: 24 * 3 + 8 * 8}[entrant]
    assert cost.forwards - 2 * cost.backwards == drawn  # base and current of each timestep; a backward of one


def test_the_table_has_a_line_for_each_variant_with_its_seeds() -> None:
    def race(seed: int, *success: float) -> Race:
        points = tuple(Point(i, Cost(1.0 * i, 1500 * i, 500 * i), s) for i, s in enumerate(success))
        return Race("lr_2e-3", seed, 2e-3, 16, points)

    edits = replace(race(0, 0.1, 0.3), preset="quickstart-edits")
    lines = tried.table([race(1, 0.4, 0.8, 0.95), edits, race(0, 0.4, 0.9, 0.92, 0.96)]).splitlines()
    assert lines[2:] == [
        "| lr 2e-3 | 0, 1 | 2, 2 | 2, 4 | 6, 4 | 5 | 0.960, 0.950 | 6, 4 |",
        "| lr 2e-3, quickstart-edits | 0 | - | - | - | - | 0.300 | 2 |",
    ]


def test_what_the_exploited_reward_did_is_told_at_a_gain_of_the_honest_one() -> None:
    held = Held("free", (0.5,) * 5 + (1.0,) * 5, (0.0,) * 5 + (0.5,) * 5)
    assert smooth(held.honest) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert held.moved(0.15) == pytest.approx(0.2)
    assert held.moved(0.6) is None


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    """The commands leave torch with one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_the_commands_tell_what_they_found_and_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--variants", "groups_of_4+timesteps_1", "--passes", "1", "--every", "1", "--images", "4"]
    assert tried.main([*runs, "--json", str(tmp_path / "tried.json")]) == 0
    assert "| groups of 4, 1 timestep | 0 |" in capsys.readouterr().out
    assert tried.main([*runs[:2], "--seeds", "--load", str(tmp_path / "tried.json")]) == 0
    assert "| groups of 4, 1 timestep | 0 |" in capsys.readouterr().out
    guarded = ["--iterations", "5", "--variant", "groups_of_4+timesteps_1", "--norm_guard", "1"]
    assert held_back.main([*guarded, "--json", str(tmp_path / "held.json")]) == 0
    assert "| norm_guard 1 |" in capsys.readouterr().out
    assert [len(run["norm"]) for run in json.loads((tmp_path / "held.json").read_text())] == [5, 5]
