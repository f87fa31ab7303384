"""The curve of the reward: what a long run has more of does not make it dearer to draw."""

import pytest

from dgpo_core.common.pictures import MOST_POINTS, reward_curve, thinned


def test_a_curve_of_few_points_is_drawn_as_it_is() -> None:
    points = [(float(i), i / 7) for i in range(MOST_POINTS)]
    assert thinned(points) == points


def test_a_curve_of_many_points_is_one_of_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(10 * MOST_POINTS + 1)]
    found = thinned(points)
    assert len(found) <= MOST_POINTS
    assert found[0] == (5.0, pytest.approx(5 / 11))  # of 11 neighbours: 0, 1, ... 10
    assert found[-1][0] > points[-1][0] - 11
    assert sum(y for _, y in found) / len(found) == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 3 * MOST_POINTS])
def test_a_curve_of_any_length_is_a_picture(count: int) -> None:
    records = [{"iteration": i, "reward": 0.5} for i in range(count)]
    assert reward_curve(records, "x").width > 600


def test_a_measurement_that_was_no_finite_number_is_left_out_of_the_curve() -> None:
    """A weight of 1e300 makes sums that are infinite; metrics.jsonl has null for them."""
    none, some = {"mean": None, "sem": None}, {"mean": 0.5, "sem": 0.1}
    records = [
        {"iteration": i, "held_out": 0.5, "in_domain": row, "watch/entropy": row} for i, row in enumerate([none, some])
    ]
    assert reward_curve(records, "x").width > 600
    assert reward_curve(records[:1], "x").width > 600
