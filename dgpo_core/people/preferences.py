"""From what a person thinks of a group to scores: rankings with ties, pairs, thumbs, ratings, and nothing at all.

An answer about one group of G images is one of these mappings (images are counted from 0):

    {"ranking": [[3], [0, 2]]}                   best first; images of one rank are tied; those left out come after all
    {"ranking": [[3]], "worst": [1]}             as before, and the worst ones come after those left out
    {"pairs": [[3, ">", 0], [1, "=", 2]]}        of two images the better one, a tie, or "?": passed over (`pairs`)
    {"thumbs": [1, -1, 0, 0]}                    good, bad, neither, for every image
    {"ratings": [5, 3.5, None, 1]}               any numbers, higher is better; None: not rated
    {"skip": True}                               nothing is said

Kinds are not mixed within one answer. Who marks only the worst gives the ranking [] with them.

The advantages of a group sum to zero, whatever the form of the answer. The scores of a ranking and of pairs do so
themselves. Thumbs and ratings stand as they are given, and an image without a rating takes the mean of the others;
every advantage then begins with `advantage.centred`, which takes the group's mean away.

How answers are kept in files is said in `preference_file`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.people.pairs import pairs_scores

Told = tuple[int, int, float]
"""(i, j, p): of two images of a group, i is better (p 1), or both are as good (p 0.5)."""
SKIP: Mapping[str, Any] = {"skip": True}
KINDS = ("ranking", "pairs", "thumbs", "ratings")
WORST = "worst"  # stands beside a ranking
MOST_RATING = 1_000_000
MOST_PAIRS = 10_000
PRESET_HELP = "image numbers from 1, best first, joined by > and =, such as 3>1=2, with * for all others, or skip"


def ranking_scores(ranking: Sequence[Sequence[int]], size: int, worst: Sequence[int] = ()) -> list[float]:
    """Scores in [-1, 1], evenly spaced from the best image (1) to the worst (-1); they sum to zero.

    The ranks of `ranking` come first, best first, then all images that are named nowhere, as one rank, then the `worst`
    as one. Tied images share the mean of the places that they take up.
    """
    named = {image for rank in (*ranking, worst) for image in rank}
    ranks = [rank for rank in (*ranking, [i for i in range(size) if i not in named], worst) if rank]
    scores, place = [0.0] * size, 0
    for rank in ranks:
        shared = place + (len(rank) - 1) / 2
        for image in rank:
            scores[image] = 1 - 2 * shared / (size - 1) if len(ranks) > 1 else 0.0
        place += len(rank)
    return scores


def middling_scores(ranking: Sequence[Sequence[int]], size: int) -> list[float]:
    """What a ranking meant in preference files without a version: who is left out is neither good nor bad.

    The ranked images are evenly spaced from 1 to -1, and the others have 0. Images of a single rank are better than
    those left out, 1 against 0.
    """
    ranked = [image for rank in ranking for image in rank]
    among = ranking_scores([[ranked.index(image) for image in rank] for rank in ranking], len(ranked))
    scores = [0.0] * size
    for image, score in zip(ranked, among, strict=True):
        scores[image] = score if len(ranking) > 1 else 1.0
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
    kind, value = _kind_of(answer)
    if kind == "skip":
        return None
    if kind == "ranking":
        worst = answer.get(WORST, [])
        _check_ranking(value, worst, size)
        scores = ranking_scores(value, size, worst)
    elif kind == "pairs":
        check_pairs(value, size)
        scores = pairs_scores(value, size)
    elif kind == "thumbs":
        _check_thumbs(value, size)
        scores = thumbs_scores(value)
    else:
        _check_ratings(value, size)
        scores = ratings_scores(value)
    return scores if any(score != scores[0] for score in scores) else None


def told_apart(answer: Any, size: int) -> list[Told]:
    """The pairs of images that an answer compares: (i, j, 1) where i is better, (i, j, 0.5) where both are as good.

    That of two images are as good is said only by who was asked about the two. Raises UserError as `scores_from`.
    """
    scores = scores_from(answer, size)
    if "pairs" in answer:
        return [(i, j, 1.0 if how == ">" else 0.5) for i, how, j in answer["pairs"] if how != "?"]
    ratings = answer.get("ratings", [0.0] * size)
    if scores is None:
        return []
    return better_of([score if rating is not None else math.nan for score, rating in zip(scores, ratings, strict=True)])


def better_of(scores: Sequence[float]) -> list[Told]:
    """The pairs that scores tell apart; NaN is not compared."""
    return [(i, j, 1.0) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]


def parse_preset(text: str) -> list[Mapping[str, Any]]:
    """Answers written down beforehand: one per group, separated by semicolons or line ends.

    "3>1=2" puts the third image first and ties the first and second; "skip" says nothing. Numbers count from 1, as the
    dialog shows them. Images that are left out come last, or where the * is: after it are the worst, "3>*>1=2".
    """
    parts = [part.strip() for part in re.split(r"[;\r\n]", text) if part.strip()]
    return [_parse_one(re.sub(r"\s*([>=*])\s*", r"\1", part), number) for number, part in enumerate(parts, 1)]


def preset_answers(text: str, sizes: Sequence[int]) -> list[Mapping[str, Any]]:
    """`parse_preset`, checked against the groups that it is for. Raises UserError for a preset that does not fit."""
    answers = parse_preset(text)
    if len(answers) != len(sizes):
        raise UserError(f"The preset has {len(answers)} rankings for {len(sizes)} groups: give one for each group.")
    for number, (answer, size) in enumerate(zip(answers, sizes, strict=True), 1):
        named = [image for rank in (*answer.get("ranking", []), answer.get(WORST, [])) for image in rank]
        unknown = [image for image in named if image >= size]
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
    rank = "[0-9]{1,6}(=[0-9]{1,6})*"
    if not re.fullmatch(rf"{rank}(>{rank})*(>\*(>{rank})?)?|\*>{rank}", part):
        raise UserError(f"{what} cannot be read: write {PRESET_HELP}.")
    better, _, worst = part.partition("*")
    ranking = [_images(rank) for rank in better.split(">") if rank]
    bottom = _images(worst.removeprefix(">"))
    images = [image for rank in (*ranking, bottom) for image in rank]
    if -1 in images:
        raise UserError(f"{what} names image 0: images are numbered from 1.")
    twice = next((image for image in images if images.count(image) > 1), None)
    if twice is not None:
        raise UserError(f"{what} names image {twice + 1} twice.")
    return {"ranking": ranking, WORST: bottom} if bottom else {"ranking": ranking}


def _images(rank: str) -> list[int]:
    """From "1=2" to [0, 1]."""
    return [int(image) - 1 for image in rank.split("=") if image]


def _kind_of(answer: Any) -> tuple[str, Any]:
    if isinstance(answer, Mapping):
        kinds = [kind for kind in answer if kind != WORST or "ranking" not in answer]
        if len(kinds) == 1 and (kinds[0] in KINDS or answer.get("skip") is True):
            return kinds[0], answer[kinds[0]]
    raise UserError(
        'The answer about a group must be {"ranking": [...]}, with or without "worst", {"pairs": [...]},'
        ' {"thumbs": [...]}, {"ratings": [...]} or {"skip": true}.'
    )


def _check_ranking(ranking: Any, worst: Any, size: int) -> None:
    if not (_is_list(ranking) and all(_is_list(rank) and rank for rank in ranking) and (ranking or worst)):
        raise UserError("A ranking must be a list of ranks, best first, each a list of one or more images.")
    if not _is_list(worst):
        raise UserError("The worst of a ranking must be a list of images.")
    images = [image for rank in (*ranking, worst) for image in rank]
    for image in images:
        _check_image(image, size, "The ranking")
        if images.count(image) > 1:
            raise UserError(f"The ranking names image {image} twice.")


def check_pairs(pairs: Any, size: int) -> None:
    """Raises UserError where they are not about two images each of a group of `size`."""
    if not _is_list(pairs) or len(pairs) > MOST_PAIRS:
        raise UserError(f"Pairs must be a list of at most {MOST_PAIRS:,} pairs.")
    for pair in pairs:
        if not (_is_list(pair) and len(pair) == 3 and pair[1] in (">", "=", "?")):
            raise UserError(f'A pair must be [image, ">", image], with "=" for a tie or "?" for neither, not {pair!r}.')
        for image in pair[::2]:
            _check_image(image, size, "The pair")
        if pair[0] == pair[2]:
            raise UserError(f"The pair names image {pair[0]} twice.")


def _check_image(image: Any, size: int, what: str) -> None:
    if type(image) is not int or not 0 <= image < size:
        raise UserError(f"{what} names image {image!r}, but the group has the images 0 to {size - 1}.")


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
