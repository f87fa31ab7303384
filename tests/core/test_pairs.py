"""Pairs: scores worked out by hand, and which pair is asked about next."""

import itertools
import math
from typing import Any

import pytest

from dgpo_core.people.pairs import SPREAD, next_pair, pairs_scores, pairs_wanted


def asked(size: int, most: int, said: dict[frozenset[int], str] | None = None) -> list[list[Any]]:
    """All pairs of a group in the order in which they come, where the lower number wins or as `said` has it."""
    pairs: list[list[Any]] = []
    while pair := next_pair(pairs, size, most):
        pairs.append([min(pair), (said or {}).get(frozenset(pair), ">"), max(pair)])
    return pairs


def test_one_pair() -> None:
    """Winner t, loser -t, the third 0; where the prior's pull is the pair's: t / SPREAD^2 = 1 / (1 + exp(2 t))."""
    better, worse, unseen = pairs_scores([[0, ">", 1]], 3)
    assert better == -worse > 0 == unseen
    assert better / SPREAD**2 == pytest.approx(1 / (1 + math.exp(2 * better)), abs=1e-8)
    assert better == pytest.approx(0.7408, abs=5e-5)  # 0.7408 / 4 = 0.1852; exp(1.4816) = 4.400 and 1 / 5.400 = 0.1852


def test_a_chain() -> None:
    """Of 0 > 1 > 2 the middle one is at 0, and the first at t / SPREAD^2 = 1 / (1 + exp(t))."""
    first, middle, last = pairs_scores([[0, ">", 1], [1, ">", 2]], 3)
    assert middle == 0
    assert first == -last
    assert first / SPREAD**2 == pytest.approx(1 / (1 + math.exp(first)), abs=1e-8)


def test_a_tie_is_half_a_win_for_each_and_a_pair_passed_over_says_nothing() -> None:
    assert pairs_scores([[0, "=", 1], [0, "?", 2]], 3) == [0, 0, 0]
    assert pairs_scores([[0, ">", 1], [1, "=", 0]], 2) != pairs_scores([[0, ">", 1]], 2)
    drawn = pairs_scores([[0, ">", 1], [1, "=", 2]], 3)
    assert drawn[0] > drawn[2] > drawn[1]  # 2 was as good as 1, which is less than what was seen of it before: nothing
    won_once = pairs_scores([[0, ">", 1], [1, ">", 0], [0, "=", 1]], 2)
    assert won_once == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [1, 50, 3000])
def test_scores_are_finite_and_sum_to_zero_however_often_it_is_said(repeats: int) -> None:
    pairs = [[i, ">", j] for i, j in itertools.combinations(range(8), 2)] * repeats
    scores = pairs_scores(pairs, 8)
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(0, abs=1e-6)
    assert math.isfinite(scores[0])


def test_the_order_in_which_pairs_were_said_does_not_matter() -> None:
    pairs = [[0, ">", 1], [2, "=", 1], [3, ">", 0]]
    assert all(pairs_scores(order, 4) == pairs_scores(pairs, 4) for order in itertools.permutations(pairs))


@pytest.mark.parametrize("size", [2, 3, 4, 8, 24])
def test_so_many_pairs_as_images_less_one_connect_the_group_and_none_comes_twice(size: int) -> None:
    pairs = asked(size, pairs_wanted(size))
    assert len(pairs) == min(math.ceil(1.5 * size), size * (size - 1) // 2)
    assert len({frozenset((i, j)) for i, _, j in pairs}) == len(pairs)
    reached = {0}
    for _ in range(size):
        reached |= {image for i, _, j in pairs[: size - 1] if {i, j} & reached for image in (i, j)}
    assert reached == set(range(size))


def test_the_best_of_a_group_is_found_by_pairs_of_its_size_and_a_half() -> None:
    scores = pairs_scores(asked(8, pairs_wanted(8)), 8)
    assert scores.index(max(scores)) == 0
    assert scores.index(min(scores)) == 7


def test_a_pair_that_was_passed_over_is_not_asked_again_and_connects_nothing() -> None:
    first = next_pair([], 3, 9)
    rest = asked(3, 9, {frozenset(first): "?"})
    assert len(rest) == 3
    assert next_pair(rest, 3, 9) is None


def test_after_the_first_pairs_come_those_that_are_least_certain() -> None:
    """Once 0 > 1 > 2 > 3 is known, neighbours of the chain are asked already: 0 and 2, or 1 and 3, before 0 and 3."""
    chain = [[0, ">", 1], [1, ">", 2], [2, ">", 3]]
    assert sorted(next_pair(chain, 4, 9)) in ([0, 2], [1, 3])


def test_either_image_may_be_on_the_left() -> None:
    pairs: list[list[Any]] = []
    lefts = []
    while pair := next_pair(pairs, 8, 12):
        lefts.append(pair[0] < pair[1])
        pairs.append([pair[0], ">", pair[1]])
    assert 2 < sum(lefts) < 10


def test_a_number_of_pairs_that_is_given_counts() -> None:
    assert [pairs_wanted(8), pairs_wanted(8, 4), pairs_wanted(3, 100)] == [12, 4, 3]
    assert len(asked(8, 4)) == 4
