"""Scores from what a person says, worked out by hand."""

from typing import Any

import pytest
import torch

from dgpo_core.common.errors import UserError
from dgpo_core.method.advantage import global_advantage, group_advantage
from dgpo_core.people.preferences import (
    SKIP,
    middling_scores,
    parse_preset,
    preset_answers,
    ranking_scores,
    scores_from,
    thumbs_scores,
)


@pytest.mark.parametrize(
    ("ranking", "size", "scores"),
    [
        ([[0], [1]], 2, [1, -1]),
        ([[2], [0], [1]], 3, [0, -1, 1]),
        ([[3], [1], [0], [4], [2]], 5, [0, 0.5, -1, 1, -0.5]),  # places 0..4 of 4: 1 - 2 * place / 4
        ([[0, 1], [2]], 3, [0.5, 0.5, -1]),  # places 0 and 1 are shared: 1 - 2 * 0.5 / 2
        ([[0], [1, 2, 3], [4]], 5, [1, 0, 0, 0, -1]),
        ([[1], [3], [5]], 6, [-0.6, 1, -0.6, 0.6, -0.6, 0.2]),  # places 3 to 5 of 5 are the others': 1 - 2 * 4 / 5
        ([[2]], 4, [-1 / 3, -1 / 3, 1, -1 / 3]),  # places 1 to 3 of 3 are the others'
        ([[2, 0]], 3, [0.5, -1, 0.5]),
        ([[0, 1, 2]], 3, [0, 0, 0]),
    ],
)
def test_a_clicked_image_is_better_than_all_that_were_not(
    ranking: list[list[int]], size: int, scores: list[float]
) -> None:
    assert ranking_scores(ranking, size) == pytest.approx(scores)
    clicked = {image for rank in ranking for image in rank}
    others = [score for image, score in enumerate(scores) if image not in clicked]
    assert all(min(scores[image] for image in clicked) > score for score in others)


@pytest.mark.parametrize(
    ("ranking", "worst", "size", "scores"),
    [
        ([[5]], [2], 6, [0, 0, -1, 0, 0, 1]),
        ([], [2], 4, [1 / 3, 1 / 3, -1, 1 / 3]),
        ([[0], [1]], [3, 4], 5, [1, 0.5, 0, -0.75, -0.75]),  # the worst share the places 3 and 4 of 4
        ([[0]], [1], 2, [1, -1]),
    ],
)
def test_the_worst_lie_below_what_was_not_named(
    ranking: list[list[int]], worst: list[int], size: int, scores: list[float]
) -> None:
    assert scores_from({"ranking": ranking, "worst": worst}, size) == pytest.approx(scores)
    assert sum(scores) == pytest.approx(0)


@pytest.mark.parametrize(
    ("ranking", "size", "scores"),
    [
        ([[5], [2]], 6, [0, 0, -1, 0, 0, 1]),
        ([[1], [0, 3]], 4, [-0.5, 1, 0, -0.5]),  # places 1 and 2 of 2 are shared
        ([[2]], 4, [0, 0, 1, 0]),
        ([[2, 0]], 3, [1, 0, 1]),
    ],
)
def test_a_ranking_in_an_old_file_leaves_what_it_does_not_name_in_the_middle(
    ranking: list[list[int]], size: int, scores: list[float]
) -> None:
    assert middling_scores(ranking, size) == pytest.approx(scores)


@pytest.mark.parametrize(
    "ranking", [[[4], [2, 0], [1], [3]], [[0, 1, 2], [3, 4]], [[1], [0], [4], [3], [2]], [[3], [0]]]
)
def test_scores_of_a_ranking_sum_to_zero_and_stay_within_bounds(ranking: list[list[int]]) -> None:
    scores = ranking_scores(ranking, 5)
    assert sum(scores) == pytest.approx(0)
    assert max(scores) <= 1
    assert min(scores) >= -1


def test_thumbs() -> None:
    assert thumbs_scores([1, 0, -1]) == [1.0, 0.0, -1.0]
    assert scores_from({"thumbs": [1, 0, -1]}, 3) == [1.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("ratings", "scores"),
    [([5, 1, 3], [5, 1, 3]), ([5, None, 1, 3], [5, 3, 1, 3]), ([None, 2.5, 0.5], [1.5, 2.5, 0.5])],
)
def test_ratings_stand_as_they_are_and_an_unrated_image_is_middling(ratings: list[Any], scores: list[float]) -> None:
    assert scores_from({"ratings": ratings}, len(ratings)) == pytest.approx(scores)


@pytest.mark.parametrize(
    "answer",
    [
        {"ranking": [[4], [2, 0], [1], [3]]},
        {"ranking": [[1], [3]]},
        {"ranking": [[2]]},
        {"ranking": [[2]], "worst": [0]},
        {"pairs": [[2, ">", 0], [1, "=", 3], [0, ">", 1]]},
        {"thumbs": [1, 1, 1, 0, -1]},
        {"ratings": [5, None, 5, 1, 2]},
    ],
)
def test_the_advantages_of_every_form_sum_to_zero(answer: dict[str, Any]) -> None:
    r = torch.tensor([scores_from(answer, 5)])
    # 5 float32 terms of size 1: rounding is below 1e-6
    assert group_advantage(r).sum().abs() < 1e-5
    assert global_advantage(r).sum().abs() < 1e-5


@pytest.mark.parametrize(
    "unsaid", [{"ratings": [None, None, None]}, {"ratings": [4, None, 4]}, {"ratings": [4, None, None]}]
)
def test_ratings_that_tell_no_image_from_another_are_no_information(unsaid: dict[str, Any]) -> None:
    assert scores_from(unsaid, 3) is None


@pytest.mark.parametrize(
    "answer",
    [
        SKIP,
        {"ranking": [[0, 1, 2]]},
        {"ranking": [], "worst": [0, 1, 2]},
        {"pairs": []},
        {"pairs": [[0, "=", 1], [1, "?", 2]]},
        {"pairs": [[0, ">", 1], [1, ">", 2], [2, ">", 0]]},
        {"thumbs": [0, 0, 0]},
        {"thumbs": [1, 1, 1]},
        {"thumbs": [-1, -1, -1]},
    ],
)
def test_what_tells_no_image_from_another_is_no_information(answer: dict[str, Any]) -> None:
    assert scores_from(answer, 3) is None


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (None, "must be"),
        ([], "must be"),
        ({}, "must be"),
        ({"skip": False}, "must be"),
        ({"skip": True, "ranking": [[0]]}, "must be"),
        ({"marks": [0]}, "must be"),
        ({"ranking": []}, "list of ranks"),
        ({"ranking": [[]]}, "list of ranks"),
        ({"ranking": [0, 1]}, "list of ranks"),
        ({"ranking": "01"}, "list of ranks"),
        ({"ranking": [[0], [3]]}, "names image 3, but the group has the images 0 to 2."),
        ({"ranking": [[-1]]}, "names image -1"),
        ({"ranking": [[True]]}, "names image True"),
        ({"ranking": [["0"]]}, "names image '0'"),
        ({"ranking": [[1], [1]]}, "names image 1 twice"),
        ({"worst": [1]}, "must be"),
        ({"thumbs": [1, 0, 0], "worst": [1]}, "must be"),
        ({"ranking": [], "worst": []}, "list of ranks"),
        ({"ranking": [[0]], "worst": 1}, "worst of a ranking must be a list"),
        ({"ranking": [[0]], "worst": [0]}, "names image 0 twice"),
        ({"ranking": [[0]], "worst": [3]}, "names image 3, but"),
        ({"pairs": {"0": 1}}, "Pairs must be a list"),
        ({"pairs": [[0, ">", 1]] * 10_001}, "at most 10,000 pairs"),
        ({"pairs": [[0, 1]]}, "A pair must be"),
        ({"pairs": [[0, "<", 1]]}, "A pair must be"),
        ({"pairs": [[0, [], 1]]}, "A pair must be"),
        ({"pairs": [[0, ">", 3]]}, "names image 3, but"),
        ({"pairs": [[1, "=", 1]]}, "names image 1 twice"),
        ({"thumbs": [1, 0]}, "each of the 3 images"),
        ({"thumbs": {"0": 1}}, "each of the 3 images"),
        ({"thumbs": [1, 0, 2]}, "not 2"),
        ({"thumbs": [1, 0, None]}, "not None"),
        ({"thumbs": [1, 0, 0.5]}, "not 0.5"),
    ],
)
def test_what_is_no_answer_is_told_in_one_sentence(answer: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        scores_from(answer, 3)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("3>1=2", [{"ranking": [[2], [0, 1]]}]),
        ("3 > 1 = 2 ;2>1", [{"ranking": [[2], [0, 1]]}, {"ranking": [[1], [0]]}]),
        ("1>2\r\n\n2>1;\n", [{"ranking": [[0], [1]]}, {"ranking": [[1], [0]]}]),
        ("10>2\nSkip", [{"ranking": [[9], [1]]}, SKIP]),
        ("4", [{"ranking": [[3]]}]),
        ("3 > * > 1", [{"ranking": [[2]], "worst": [0]}]),
        (
            "4>3=2>*>1=5; *>2; 2>*",
            [{"ranking": [[3], [2, 1]], "worst": [0, 4]}, {"ranking": [], "worst": [1]}, {"ranking": [[1]]}],
        ),
        (" ; \n", []),
    ],
)
def test_preset(text: str, answers: list[dict[str, Any]]) -> None:
    assert parse_preset(text) == answers


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1>2; 2>x", "Ranking 2 of the preset, '2>x', cannot be read: write image numbers from 1"),
        ("1 2", "Ranking 1 of the preset, '1 2', cannot be read"),
        ("1>>2", "cannot be read"),
        ("1<2", "cannot be read"),
        ("-1>2", "cannot be read"),
        ("*", "cannot be read"),
        ("1>*=2", "cannot be read"),
        ("1>*>2>3", "cannot be read"),
        ("1>*>*", "cannot be read"),
        ("3>*>3", "names image 3 twice."),
        ("3>1=0", "names image 0: images are numbered from 1."),
        ("3>1=3", "names image 3 twice."),
    ],
)
def test_a_preset_that_cannot_be_read(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_preset(text)


def test_a_preset_must_fit_its_groups() -> None:
    assert preset_answers("1>4; skip", [4, 3]) == [{"ranking": [[0], [3]]}, SKIP]
    with pytest.raises(UserError, match="The preset has 1 rankings for 2 groups"):
        preset_answers("1>4", [4, 3])
    with pytest.raises(UserError, match="Ranking 2 of the preset names image 4, but its group has images 1 to 3."):
        preset_answers("1>4; 4>1", [4, 3])
    with pytest.raises(UserError, match="Ranking 1 of the preset names image 4, but its group has images 1 to 3."):
        preset_answers("1>*>4", [3])
