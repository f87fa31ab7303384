"""From answers about pairs of images to scores, and which pair to ask about next: a Bradley-Terry model with a prior.

    P(i is better than j) = sigmoid(s_i - s_j)        s_i ~ N(0, SPREAD^2), each by itself

What is said about a group is a list of [i, ">", j] (i is better), [i, "=", j] (a tie: half a win for each) and
[i, "?", j] (the pair was passed over: it says nothing, and is not asked again). The scores are the most probable s of a
group of G images given that, [G]. They sum to zero, and an image that was in no pair has 0.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

SPREAD = 2.0
"""Standard deviation of an image's score before anything is said. So of two images drawn at random the better one wins
about five times in six."""
PER_IMAGE = 1.5
"""Pairs asked about in a group, by image. One less than G pairs connect G images; the rest settle what is unclear."""
DIGITS = 9  # of scores and gains: what differs only by rounding is equal

Pair = Sequence[Any]
"""[i, how, j] as above."""


def pairs_wanted(size: int, wanted: int = 0) -> int:
    """How many pairs of a group of `size` images to ask about: `wanted`, or where that is 0 `PER_IMAGE` times size."""
    return min(wanted or math.ceil(PER_IMAGE * size), size * (size - 1) // 2)


def pairs_scores(pairs: Sequence[Pair], size: int) -> list[float]:
    """The most probable scores of the `size` images, given what was said."""
    s, _ = _posterior(pairs, size)
    return [round(score, DIGITS) + 0.0 for score in s.tolist()]  # + 0.0: no -0.0


def next_pair(pairs: Sequence[Pair], size: int, most: int) -> tuple[int, int] | None:
    """The pair that tells most (left, right), of those not asked yet; None after `most` pairs, or where all were asked.

    It is the one with the highest p (1 - p) v: p is the probability that the left one wins, v the variance of the
    difference of the two scores. So it joins what is uncertain and near each other. While images are not all connected
    by pairs, directly or through others, only pairs that connect count: all can be compared as soon as possible.
    """
    asked, part = {frozenset((i, j)) for i, _, j in pairs}, _parts(pairs, size)
    left = [pair for pair in combinations(range(size), 2) if frozenset(pair) not in asked]
    if len(pairs) >= most or not left:
        return None
    apart = [(i, j) for i, j in left if part[i] != part[j]]
    s, covariance = _posterior(pairs, size)
    p = torch.sigmoid(s[:, None] - s[None])
    v = covariance.diag()[:, None] + covariance.diag()[None] - 2 * covariance
    gain = (p * (1 - p) * v).tolist()
    i, j = max(apart or left, key=lambda pair: round(gain[pair[0]][pair[1]], DIGITS))
    return (i, j) if (i + j) % 2 else (j, i)  # neither side is the earlier image's


def _posterior(pairs: Sequence[Pair], size: int) -> tuple[Tensor, Tensor]:
    """The most probable s, [G], and the covariance around it (Laplace's approximation), [G, G]; float64."""
    wins = torch.zeros(size, size, dtype=torch.float64)  # [i, j]: how often i was better than j
    for i, how, j in pairs:
        won = {">": (1.0, 0.0), "=": (0.5, 0.5), "?": (0.0, 0.0)}[how]
        wins[i, j] += won[0]
        wins[j, i] += won[1]
    prior = torch.eye(size, dtype=torch.float64) / SPREAD**2

    def loss(s: Tensor) -> Tensor:
        return s @ prior @ s / 2 - (wins * torch.nn.functional.logsigmoid(s[:, None] - s[None])).sum()

    s = torch.zeros(size, dtype=torch.float64)
    while True:  # Newton's method; the loss is strictly convex
        p = torch.sigmoid(s[:, None] - s[None])
        pull = wins * (1 - p) - wins.T * p  # of j on i
        curvature = (wins + wins.T) * p * (1 - p)
        hessian = prior + curvature.sum(1).diag() - curvature
        step = torch.linalg.solve(hessian, pull.sum(1) - prior @ s)
        if step.abs().max() < 1e-10:
            return s, torch.linalg.inv(hessian)
        while step.abs().max() > 1e-3 and loss(s + step) > loss(s):  # below that it converges by itself
            step = step / 2
        s = s + step


def _parts(pairs: Sequence[Pair], size: int) -> list[int]:
    """A number for each image, the same for those that pairs connect."""
    part = list(range(size))
    for i, how, j in pairs:
        if how != "?":
            part = [part[i] if other == part[j] else other for other in part]
    return part
