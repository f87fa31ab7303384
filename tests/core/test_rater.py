"""The simulated rater: what it says of a group, and that training on it helps."""

import math

import pytest
import torch

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.demo import rater as rater_module
from dgpo_core.demo.rater import RaterConfig, SimulatedRater, main, ranks
from dgpo_core.demo.world import SIZE


def a_group(seed: int = 0, size: int = 6) -> Group:
    facts = {"include": [{"shape": "circle", "color": "red", "count": 1}], "relation": None}
    images = torch.zeros(size, 3, SIZE, SIZE)
    return Group(Prompt("a red circle", facts), tuple(range(seed, seed + size)), torch.zeros(size, 1, 1, 1), images)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier finds these scores in every group."""
    scores = torch.tensor([0.5, 1.0, 0.0, 1.0, 0.6, 0.45])
    monkeypatch.setattr(rater_module.ShapesGraded, "score", lambda self, images, *_: scores[: len(images)])


@pytest.mark.parametrize(
    ("scores", "ties", "ranking"),
    [
        ([0.1, 0.9, 0.5], 0.0, [[1], [2], [0]]),
        ([0.5, 0.5, 0.7], 0.0, [[2], [0, 1]]),
        ([1.0, 0.9, 0.8, 0.75], 0.15, [[0, 1], [2, 3]]),  # 0.8 is near 0.9, but not near the first of its rank
        ([0.3, 0.2], 1.0, [[0, 1]]),
    ],
)
def test_ranks_with_ties(scores: list[float], ties: float, ranking: list[list[int]]) -> None:
    assert ranks(scores, ties) == ranking


@pytest.mark.usefixtures("seen")
def test_without_slips_it_says_what_the_verifier_sees() -> None:
    group = a_group()
    assert SimulatedRater("full", 0.0, 0.07).answer(group) == {"ranking": [[1, 3], [4], [0, 5], [2]]}
    assert SimulatedRater("best", 0.0).answer(group) == {"ranking": [[1]]}
    assert SimulatedRater("thumbs", 0.0).answer(group) == {"thumbs": [0, 1, -1, 1, 0, -1]}
    said = SimulatedRater("pairs", 0.0, 0.07).answer(group)["pairs"]
    assert len(said) == 9
    scores = dict(enumerate([0.5, 1.0, 0.0, 1.0, 0.6, 0.45]))
    for better, how, worse in said:
        assert how == ("=" if {better, worse} in ({1, 3}, {0, 5}) else ">")
        assert scores[better] >= scores[worse]
    assert len(SimulatedRater("pairs", 0.0, pairs=4).answer(group)["pairs"]) == 4
    assert SimulatedRater("thumbs", 0.0).score_groups([group, group]).tolist() == [0, 1, -1, 1, 0, -1] * 2


@pytest.mark.usefixtures("seen")
def test_slips_are_the_groups_own_and_as_large_as_asked() -> None:
    rater = SimulatedRater("full", 0.2)
    assert rater.answer(a_group()) == SimulatedRater("full", 0.2).answer(a_group())
    said = [str(rater.answer(a_group(seed))) for seed in range(20)]
    assert len(set(said)) > 10
    assert str(SimulatedRater("full", 0.2, seed=1).answer(a_group())) != said[0]
    # 1.0 slips below 0.5, or is passed by it, where the two slips differ by 0.5: that is sqrt(2) * 0.2 * 1.77
    swapped = 0
    for seed in range(0, 4000, 4):
        (best,) = SimulatedRater("best", 0.2).answer(a_group(seed, 2))["ranking"][0]
        swapped += best == 0
    expected = 0.5 * math.erfc(0.5 / 0.2 / 2)
    assert swapped / 1000 == pytest.approx(expected, abs=0.025)  # 3 standard deviations of a count of 1000


@pytest.mark.usefixtures("seen")
def test_a_group_that_all_looks_the_same_trains_nothing() -> None:
    scores = SimulatedRater("full", 0.0, ties=2.0).score_groups([a_group()])
    assert scores.tolist() == [0.0] * 6


def test_it_rates_groups_only() -> None:
    with pytest.raises(UserError, match="scores the groups of a training"):
        SimulatedRater().score(torch.zeros(1, 3, SIZE, SIZE), ["a red circle"], [{}])


@pytest.mark.slow
def test_the_command_says_how_many_groups_it_took(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    argv = ["--modes", "full", "--seeds", "0", "--gain", "0.01", "--groups", "2", "--size", "4", "--images", "50"]
    assert main([*argv, "--most", "12", "--json", str(tmp_path / "rated.json")]) == 0
    told = capsys.readouterr().out
    assert "groups of 4 rated until success is 0.01 higher" in told
    assert (tmp_path / "rated.json").exists()


@pytest.mark.slow
def test_a_run_that_gains_too_little_says_so() -> None:
    options = RaterConfig(gain=0.9, most=1, groups=1, size=2, images=10)
    outcome = rater_module.run(options, "thumbs", 0)
    assert outcome.rated is None
    assert len(outcome.success) == 2
    assert "more than 1" in rater_module.table([outcome], RaterConfig(modes=("thumbs",), most=1, groups=1))


def test_by_pairs_it_says_how_many_a_group_took() -> None:
    outcomes = [rater_module.Outcome("pairs", 0, 20, [0.4, 0.7])]
    assert "pairs      20  (20) of 12 pairs each" in rater_module.table(outcomes, RaterConfig(modes=("pairs",)))


@pytest.mark.slow
def test_with_a_taste_the_gain_needs_a_dozen_rated_groups() -> None:
    """Without, the first seeds take 20 to 28 (dgpo_core/demo/README.md)."""
    options = RaterConfig(taste=True, images=200, every=2, most=16)
    outcome = rater_module.run(options, "full", 0)
    assert outcome.rated is not None, outcome
    assert outcome.rated <= 12, outcome
    assert outcome.given < 4 * len(outcome.success) * 2
