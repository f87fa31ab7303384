"""From what a person thinks of a group to scores: rankings with ties, thumbs, ratings, and nothing at all.

An answer about one group of G images is one of these mappings (images are counted from 0):

    {"ranking": [[3], [0, 2], [1]]}      best first; images of one rank are tied; images may be left out
    {"thumbs": [1, -1, 0, 0]}            good, bad, neither, for every image
    {"ratings": [5, 3.5, None, 1]}       any numbers, higher is better; None: not rated
    {"skip": True}                       nothing is said

Who marks only the best and the worst gives the ranking [[best], [worst]].

The advantages of a group sum to zero, whatever the form of the answer. A ranking's scores do so themselves (but for the
exception that `ranking_scores` names). Thumbs and ratings stand as they are given, and an image without a rating takes
the mean of the others; every advantage then begins with `advantage.centred`, which takes the group's mean away.

How answers are kept in files is said in `preference_file`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dgpo_core.common.errors import UserError

SKIP: Mapping[str, Any] = {"skip": True}
KINDS = ("ranking", "thumbs", "ratings")
MOST_RATING = 1_000_000
PRESET_HELP = "image numbers from 1 joined by > and =, such as 3>1=2, or skip"


def ranking_scores(ranking: Sequence[Sequence[int]], size: int) -> list[float]:
    """Scores in [-1, 1], evenly spaced from the best (1) to the worst (-1) of the ranked images.

    Tied images share the mean of the places that they take up. Images that are not in `ranking` get 0, the middle:
    neither good nor bad. So the scores sum to zero, and "the best and the worst" alone is a ranking. The one exception
    is a ranking with a single rank: its images are better than those left out, 1 against 0.
    """
    scores = [0.0] * size
    last = sum(map(len, ranking)) - 1
    place = 0
    for rank in ranking:
        shared = place + (len(rank) - 1) / 2
        for image in rank:
            scores[image] = 1 - 2 * shared / last if len(ranking) > 1 else 1.0
        place += len(rank)
    return scores


def thumbs_scores(thumbs: Sequence[int]) -> list[float]:
    """1 for a thumb up, -1 for a thumb down, 0 for neither."""
    return [float(thumb) for thumb in thumbs]


def ratings_scores(ratings: Sequence[float | None]) -> list[float]:
    """The ratings as they are; an image without one gets the mean of the others: it is neither good nor bad."""
    rated = [float(rating) for rating in ratings if rating is not None]
    middle = math.fsum(rated) / len(rated) if rated else 0.0
    return [middle if rating is None else float(rating) for rating in ratings]


def scores_from(answer: Any, size: int) -> list[float] | None:
    """The scores that an answer gives to the `size` images of its group; None where it tells none from another.

    Raises UserError in one sentence for whatever is no answer about such a group.
    """
    kind, value = _only_item(answer)
    if kind == "skip":
        return None
    if kind == "ranking":
        _check_ranking(value, size)
        scores = ranking_scores(value, size)
    elif kind == "thumbs":
        _check_thumbs(value, size)
        scores = thumbs_scores(value)
    else:
        _check_ratings(value, size)
        scores = ratings_scores(value)
    return scores if any(score != scores[0] for score in scores) else None


def parse_preset(text: str) -> list[Mapping[str, Any]]:
    """Answers written down beforehand: one per group, separated by semicolons or line ends.

    "3>1=2" puts the third image first and ties the first and second; "skip" says nothing. Numbers count from 1, as the
    dialog shows them; images may be left out.
    """
    parts = [part.strip() for part in re.split(r"[;\r\n]", text) if part.strip()]
    return [_parse_one(re.sub(r"\s*([>=])\s*", r"\1", part), number) for number, part in enumerate(parts, 1)]


def preset_answers(text: str, sizes: Sequence[int]) -> list[Mapping[str, Any]]:
    """`parse_preset`, checked against the groups that it is for. Raises UserError for a preset that does not fit."""
    answers = parse_preset(text)
    if len(answers) != len(sizes):
        raise UserError(f"The preset has {len(answers)} rankings for {len(sizes)} groups: give one for each group.")
    for number, (answer, size) in enumerate(zip(answers, sizes, strict=True), 1):
        unknown = [image for rank in answer.get("ranking", []) for image in rank if image >= size]
        if unknown:
            image = unknown[0] + 1
            raise UserError(
                f"Ranking {number} of the preset names image {image}, but its group has images 1 to {size}."
            )
    return answers


def _parse_one(part: str, number: int) -> Mapping[str, Any]:
    what = f"Ranking {number} of the preset, {part!r},"
    if part.lower() == "skip":
        return SKIP
    if not re.fullmatch(r"[0-9]{1,6}([>=][0-9]{1,6})*", part):
        raise UserError(f"{what} cannot be read: write {PRESET_HELP}.")
    ranking = [[int(image) - 1 for image in rank.split("=")] for rank in part.split(">")]
    images = [image for rank in ranking for image in rank]
    if -1 in images:
        raise UserError(f"{what} names image 0: images are numbered from 1.")
    twice = next((image for image in images if images.count(image) > 1), None)
    if twice is not None:
        raise UserError(f"{what} names image {twice + 1} twice.")
    return {"ranking": ranking}


def _only_item(answer: Any) -> tuple[str, Any]:
    if isinstance(answer, Mapping) and len(answer) == 1:
        kind, value = next(iter(answer.items()))
        if kind in KINDS or (kind == "skip" and value is True):
            return kind, value
    raise UserError(
        'The answer about a group must be {"ranking": [...]}, {"thumbs": [...]}, {"ratings": [...]} or {"skip": true}.'
    )


def _check_ranking(ranking: Any, size: int) -> None:
    if not (_is_list(ranking) and ranking and all(_is_list(rank) and rank for rank in ranking)):
        raise UserError("A ranking must be a list of ranks, best first, each a list of one or more images.")
    images = [image for rank in ranking for image in rank]
    for image in images:
        if type(image) is not int or not 0 <= image < size:
            raise UserError(f"The ranking names image {image!r}, but the group has the images 0 to {size - 1}.")
        if images.count(image) > 1:
            raise UserError(f"The ranking names image {image} twice.")


def _check_thumbs(thumbs: Any, size: int) -> None:
    if not _is_list(thumbs) or len(thumbs) != size:
        raise UserError(f"Thumbs must be a list with one entry for each of the {size} images of the group.")
    for thumb in thumbs:
        if type(thumb) is not int or thumb not in (-1, 0, 1):
            raise UserError(f"A thumb must be 1, 0 or -1, not {thumb!r}.")


def _check_ratings(ratings: Any, size: int) -> None:
    if not _is_list(ratings) or len(ratings) != size:
        raise UserError(f"Ratings must be a list with one entry for each of the {size} images of the group.")
    for rating in ratings:
        if rating is not None and not is_rating(rating):
            raise UserError(f"A rating must be a number, or null for none, not {rating!r}.")


def is_rating(value: Any) -> bool:
    """Whether it is a number that stays what it is in float32, and in its square: at most a million, either way."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MOST_RATING


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
