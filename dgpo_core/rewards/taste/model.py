"""The model of a taste: a weight for each feature, fitted to which pictures of a group somebody found better.

    P(i is better than j) = sigmoid(w . (z_i - z_j))        w_k ~ N(0, 1 / RIDGE), each by itself

z are the features [D], centred, each divided by its standard deviation within groups and by the square root of the
size of its block: so 768 numbers of CLIP's say no more beforehand than the one of the fit to the prompt. The fit is the
most probable w, by Newton's method: nothing is random, and it takes seconds.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.special import stdtrit
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import write_atomic
from dgpo_core.common.reading import parse_json, read_bytes, shown
from dgpo_core.rewards.taste.features import KINDS, Features

RIDGE = 3.0
"""Strength of the prior. On the embedded model's pictures the best of 0.03 to 3 for 4 to 48 groups of 8."""
FOLDS = 10
CHANCE = 0.5
MOST_BYTES = 2_000_000
VERSION = 1
KEY = "dgpo.taste"

Pair = tuple[int, int, float]
"""(i, j, p): image i is better than image j (p 1), or as good (p 0.5)."""


@dataclass(frozen=True, eq=False)
class Judged:
    """A group that somebody judged: its features float32 [G, D], and the pairs that follow from the answer.

    pictures: what each is known by in other groups; "" for one that is in no other.
    """

    x: Tensor
    pairs: tuple[Pair, ...]
    pictures: tuple[str, ...] = ()

    @property
    def told_apart(self) -> list[Pair]:
        """The pairs of which one is better."""
        return [pair for pair in self.pairs if pair[2] != CHANCE]


@dataclass(frozen=True)
class Agreement:
    """How often the taste orders two pictures as the person did, where it has not seen the answer: mean over groups,
    with a 95 % interval."""

    mean: float = 0.0
    low: float = 0.0
    high: float = 1.0
    groups: int = 0

    @staticmethod
    def of(shares: Sequence[float]) -> "Agreement":
        """From the share of each group's pairs.

        The interval is Student's over the groups and one more, made up, at chance: so a few groups that happen to agree
        do not seem certain. Groups are what is drawn at random; the pairs of one depend on each other.
        """
        if not shares:
            return Agreement()
        counted = [*shares, CHANCE]
        half = float(stdtrit(len(shares), 0.975)) * stdev(counted) / math.sqrt(len(counted))
        middle = fmean(counted)
        return Agreement(fmean(shares), max(0.0, middle - half), min(1.0, middle + half), len(shares))

    @property
    def above_chance(self) -> bool:
        """Whether the interval's lower end is above one half: else a taste is not served."""
        return self.low > CHANCE

    def __str__(self) -> str:
        return f"{self.mean:.0%} of the pairs (95 % interval {self.low:.0%} to {self.high:.0%})"


@dataclass(frozen=True, eq=False)
class Taste:
    """w as above on raw features: a picture's score is (features - centre) . weights, in units of the logit.

    weights, centre: float32 [D]. kind: of the features. groups, images, pairs: what it was fitted to, pairs told apart.
    covariance: of the weights, float32 [D, D], where it was fitted here; a file does not hold it.
    """

    kind: str
    weights: Tensor
    centre: Tensor
    groups: int
    images: int
    pairs: int
    agreement: Agreement
    covariance: Tensor | None = field(default=None, repr=False)

    def scores(self, x: Tensor) -> Tensor:
        """float32 [B] of features [B, D]."""
        return (x - self.centre) @ self.weights

    def doubt(self, x: Tensor) -> float:
        """How much of a group's differences it expects to get the wrong way round: 0 (none) to 0.5 (no idea).

        x: the group's features, [G, D]. Where all pictures are surely about as good there is little to get wrong.
        """
        assert self.covariance is not None, "only of a taste that was fitted here"
        i, j = torch.triu_indices(len(x), len(x), 1)
        d = (x[i] - x[j]).double()
        mean = (d @ self.weights.double()).abs()
        spread = (d @ self.covariance.double() * d).sum(1).clamp(min=1e-12).sqrt()
        normal = torch.distributions.Normal(0.0, 1.0)
        density = torch.exp(normal.log_prob(mean / spread))
        wrong = spread * density - mean * normal.cdf(-mean / spread)  # E[max(0, -difference)]
        return float(wrong.sum() / (mean + 2 * wrong + _FLOOR).sum())  # E|difference| = mean + 2 wrong

    def save(self, path: str | Path) -> None:
        """Whole or not at all. Raises UserError for what the system refuses."""
        said = {"version": VERSION, "features": self.kind, "groups": self.groups, "images": self.images}
        said |= {"pairs": self.pairs, "agreement": asdict(self.agreement)}
        tensors = {"weights": self.weights.contiguous(), "centre": self.centre.contiguous()}
        metadata = {KEY: json.dumps(said)}
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))

    @staticmethod
    def load(path: str | Path) -> "Taste":
        """Raises UserError in one sentence for a file that is no taste."""
        try:
            if Path(path).stat().st_size > MOST_BYTES:
                raise UserError(f"{shown(path, 1000)} is no taste: it has more than {MOST_BYTES // 10**6} MB.")
            with safe_open(path, "pt") as file:
                metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"The taste {shown(path, 1000)} cannot be read ({shown(error, 200)}).") from None
        try:
            return _taste_of(parse_json(metadata.get(KEY, ""), "The metadata"), tensors)
        except (KeyError, TypeError, ValueError, OverflowError, UserError) as error:
            raise UserError(
                f"{shown(path, 1000)} is no taste that this version reads ({shown(error, 100)}): make it with"
                " python -m dgpo_core.people.taste."
            ) from None


_FLOOR = 0.5  # logits: two pictures that differ by less are about as good


def _taste_of(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Taste:
    weights, centre = tensors["weights"].float(), tensors["centre"].float()
    if said["version"] != VERSION or said["features"] not in KINDS:
        raise ValueError("of another version or kind")
    if weights.ndim != 1 or weights.shape != centre.shape or not bool((weights + centre).isfinite().all()):
        raise ValueError("weights of a wrong shape, or not finite")
    groups, images, pairs = (int(said[name]) for name in ("groups", "images", "pairs"))
    a = said["agreement"]
    mean, low, high = (float(a[name]) for name in ("mean", "low", "high"))
    if not all(0 <= share <= 1 for share in (mean, low, high)):
        raise ValueError("an agreement that is no share")
    agreement = Agreement(mean, low, high, int(a["groups"]))
    return Taste(said["features"], weights, centre, groups, images, pairs, agreement)


def fit(judged: Sequence[Judged], seen: Features, *, held_out: bool = True) -> Taste:
    """The taste of these answers. held_out: also how well it agrees, by cross-validation over whole groups, of which
    those with a picture in common are on one side and count as one.

    Raises UserError where no pair is told apart.
    """
    told = [group for group in judged if group.told_apart]
    if not told:
        raise UserError("There is nothing to learn a taste from: no group has a better and a worse picture.")
    x = torch.cat([group.x for group in told]).double()
    scale = _scale([group.x.double() for group in told], seen.blocks)
    w, covariance = _most_probable(told, scale)
    shares = _held_out(told, scale) if held_out else []
    return Taste(
        seen.kind,
        (w * scale).float(),
        x.mean(0).float(),
        len(told),
        len(x),
        sum(len(group.told_apart) for group in told),
        Agreement.of(shares),
        (covariance * scale[:, None] * scale[None]).float(),
    )


def digest_of(path: Path) -> str:
    """16 letters that are the same for the same file. Raises UserError where it cannot be read."""
    return hashlib.blake2b(read_bytes(path, "The taste", MOST_BYTES), digest_size=8).hexdigest()


def summary(taste: Taste) -> str:
    """What a taste was fitted to and how well it does, in sentences."""
    made = f"made of {taste.groups} groups, {taste.images} pictures and {taste.pairs} pairs told apart ({taste.kind})."
    if taste.agreement.groups < 2:
        alone = "One group (or several that have pictures in common) cannot tell how well it does"
        return f"{made} {alone}, so it is not served as a reward: rate more."
    agrees = f"{made} It agrees with {taste.agreement} that it had not seen."
    return agrees if taste.agreement.above_chance else f"{agrees} That may be chance, so it is not served: rate more."


def agreed(scores: Tensor, group: Judged) -> float:
    """The share of the pairs told apart that the scores [G] order alike; equal scores count half."""
    right = [float(scores[i] > scores[j]) + CHANCE * float(scores[i] == scores[j]) for i, j, _ in group.told_apart]
    return fmean(right)


def _scale(groups: Sequence[Tensor], blocks: Sequence[tuple[str, int]]) -> Tensor:
    """What features are multiplied by, float64 [D]; 0 for what never differs within a group."""
    within = torch.cat([x - x.mean(0) for x in groups])
    deviation = within.square().mean(0).sqrt()
    sizes = torch.cat([torch.full((width,), float(width), dtype=torch.float64) for _, width in blocks])
    steady = deviation < 1e-6 * (1e-3 + torch.cat(list(groups)).abs().mean(0))
    return torch.where(steady, 0.0, 1 / (deviation.clamp(min=1e-12) * sizes.sqrt()))


def _held_out(groups: Sequence[Judged], scale: Tensor) -> list[float]:
    """What a taste fitted to the other folds agrees with, for each group; one share for those that share a picture."""
    kin = _kin(groups)
    folds = min(FOLDS, max(kin) + 1)
    shares: list[list[float]] = [[] for _ in range(max(kin) + 1)]
    for fold in range(folds if folds > 1 else 0):
        w, _ = _most_probable([group for group, k in zip(groups, kin, strict=True) if k % folds != fold], scale)
        for group, k in zip(groups, kin, strict=True):
            if k % folds == fold:
                shares[k].append(agreed(group.x.double() @ (w * scale), group))
    return [fmean(of) for of in shares if of]


def _kin(groups: Sequence[Judged]) -> list[int]:
    """A number for each group, counted from 0: one for groups that have a picture in common, also by way of others."""
    kin, first = list(range(len(groups))), dict[str, int]()
    for i, group in enumerate(groups):
        for picture in filter(None, group.pictures):
            one, other = sorted((kin[i], kin[first.setdefault(picture, i)]))
            if one != other:
                kin = [one if k == other else k for k in kin]
    numbers = {k: number for number, k in enumerate(dict.fromkeys(kin))}
    return [numbers[k] for k in kin]


def _most_probable(groups: Sequence[Judged], scale: Tensor) -> tuple[Tensor, Tensor]:
    """w [D] and its covariance [D, D] (Laplace's approximation), float64.

    Worked out in the space that the groups' differences span, which is small where groups are few. The pairs of a group
    count as G at most: all 28 pairs of a ranking of 8 are not 28 answers.
    """
    d, p, counts = _differences(groups, scale)
    basis = _span(groups, scale)
    if not len(basis):  # all pictures of each group are the same: as good as no answers
        return torch.zeros_like(scale), torch.eye(len(scale), dtype=torch.float64) / RIDGE
    d = d @ basis.T
    w, ridge = torch.zeros(len(basis), dtype=torch.float64), RIDGE * torch.eye(len(basis), dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        logits = d @ w
        return RIDGE * w @ w / 2 + (counts * (torch.nn.functional.softplus(logits) - p * logits)).sum()

    for _ in range(100):  # Newton's method; the loss is strictly convex
        chance = torch.sigmoid(d @ w)
        slope = RIDGE * w - d.T @ (counts * (p - chance))
        step = torch.linalg.solve(ridge + (d.T * (counts * chance * (1 - chance))) @ d, -slope)
        while step.abs().max() > 1e-6 and loss(w + step) > loss(w):
            step = step / 2
        w = w + step
        if step.abs().max() < 1e-9:
            break
    chance = torch.sigmoid(d @ w)
    inverse = torch.linalg.inv(ridge + (d.T * (counts * chance * (1 - chance))) @ d)
    outside = torch.eye(len(scale), dtype=torch.float64) - basis.T @ basis  # what no answer was about
    return basis.T @ w, basis.T @ inverse @ basis + outside / RIDGE


def _span(groups: Sequence[Judged], scale: Tensor) -> Tensor:
    """Orthonormal rows [R, D] whose sums the groups' differences are; the identity where there are enough of those.

    R is 0 where no pictures of a group differ.
    """
    within = torch.cat([(x - x.mean(0)) * scale for x in (group.x.double() for group in groups)])
    if len(within) > len(scale):
        return torch.eye(len(scale), dtype=torch.float64)
    _, singular, basis = torch.linalg.svd(within, full_matrices=False)
    return basis[singular > 1e-9 * singular.max()]


def _differences(groups: Sequence[Judged], scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of all pairs: scaled differences [N, D], p [N], and how much each counts [N]; float64."""
    rows: list[Tensor] = []
    shares: list[float] = []
    counts: list[float] = []
    for group in groups:
        i, j, p = zip(*group.pairs, strict=True)
        x = group.x.double() * scale
        rows.append(x[list(i)] - x[list(j)])
        shares += p
        counts += [min(1.0, len(x) / len(p))] * len(p)
    return torch.cat(rows), torch.tensor(shares, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
