"""What a training says of the answers that a person gave."""

from __future__ import annotations

import pytest

from dgpo_core.people.told import NEWEST, curve, said

pytestmark = pytest.mark.slow

FIRST = {"iteration": 1, "asked": 4, "ranked": 4}
NEXT = {"iteration": 2, "asked": 4, "ranked": 3, "wins": 18.0, "against": 24}
OF_A_REWARD = {"iteration": 1, "reward": 0.5}


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([], ""),
        ([OF_A_REWARD], ""),
        ([{**FIRST, "ranked": 1, "asked": 1}], "1 group ranked"),
        ([FIRST], "4 groups ranked"),
        ([FIRST, NEXT], "7 groups ranked, 1 skipped, the newest pictures win 75 % against the first"),
    ],
)
def test_it_says_what_was_told(records: list[dict[str, float]], sentence: str) -> None:
    assert said(records) == sentence


def test_the_newest_pictures_are_those_of_the_last_rounds() -> None:
    lost = {"iteration": 2, "asked": 1, "ranked": 1, "wins": 0.0, "against": 8}
    won = [{**lost, "iteration": 3 + i, "wins": 8.0} for i in range(NEWEST)]
    assert said([lost, *won]).endswith("win 100 % against the first")


def test_there_is_a_curve_where_somebody_was_asked() -> None:
    assert curve([OF_A_REWARD]) is None
    for records in ([FIRST], [FIRST, NEXT]):
        picture = curve(records)
        assert picture is not None
        assert picture.width > 600
