"""How good is an adapter? The scores of an evaluation's images, their mean, and the gain between two evaluations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import write_atomic
from dgpo_core.common.group import Group
from dgpo_core.common.reading import require_ordinary, shown
from dgpo_core.rewards import weights_of
from dgpo_core.settings.config import MOST_ITERATIONS, PEOPLE, STATISTICS, Config, RewardTerm


@dataclass(frozen=True)
class Measurement:
    """The mean reward over n images, with its 95 % confidence interval."""

    mean: float
    ci95: tuple[float, float]
    n: int

    @staticmethod
    def of(scores: Tensor) -> "Measurement":
        """From [n] scores of independently drawn images; normal approximation."""
        n, mean = len(scores), scores.mean().item()
        half = 1.96 * scores.std().item() / math.sqrt(n) if n > 1 else 0.0
        return Measurement(mean, (mean - half, mean + half), n)

    def as_json(self) -> dict[str, object]:
        """As summary.json holds it."""
        return {"mean": self.mean, "ci95": list(self.ci95), "n": self.n}

    def __str__(self) -> str:
        return f"{self.mean:.3f}  (95 % interval {self.ci95[0]:.3f} to {self.ci95[1]:.3f}, {self.n} images)"


@dataclass(frozen=True)
class Gain:
    """The mean of the differences between two evaluations, image by image, and its standard error; n images.

    The same prompt and seed are compared, so what differs from prompt to prompt and from seed to seed falls out. sem is
    the larger of two: that of independent images, and that of independent prompts, whose images may rise and fall
    together. It is infinite where nothing can be said.
    """

    mean: float
    sem: float
    n: int

    @staticmethod
    def of(differences: Tensor, prompts: Tensor) -> "Gain":
        """From [n] differences and the number of each one's prompt, [n]."""
        n = len(differences)
        if n < 2:
            return Gain(differences.mean().item() if n else math.nan, math.inf, n)
        mean = differences.double().mean()
        off = differences.double() - mean
        by_image = off.square().sum() * n / (n - 1)
        _, owner = prompts.unique(return_inverse=True)
        sums = torch.zeros(int(owner.max()) + 1, dtype=off.dtype).index_add_(0, owner, off)
        by_prompt = sums.square().sum() * len(sums) / max(1, len(sums) - 1)
        return Gain(mean.item(), torch.maximum(by_image, by_prompt).sqrt().item() / n, n)

    @property
    def ci95(self) -> tuple[float, float]:
        """The 95 % confidence interval; normal approximation."""
        return self.mean - 1.96 * self.sem, self.mean + 1.96 * self.sem


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the images of one evaluation scored, image by image.

    places: int64 [n, 2], of each image the number of its prompt and its number among that prompt's images; the same
    place has the same prompt and seed in every evaluation. scores: float32 [n] by reward.
    """

    iteration: int
    places: Tensor
    scores: Mapping[str, Tensor]

    @staticmethod
    def of(iteration: int, rows: Sequence[tuple[int, Mapping[str, Tensor]]]) -> "Evaluation":
        """From the number of each prompt and the scores of its images, [G] by reward."""
        scores = {name: torch.cat([row[name] for _, row in rows]) for name in rows[0][1]}
        places = [(i, copy) for i, row in rows for copy in range(len(next(iter(row.values()))))]
        return Evaluation(iteration, torch.tensor(places), scores)

    def __len__(self) -> int:
        return len(self.places)

    def total(self, weights: Mapping[str, float]) -> Tensor:
        """The weighted sum of the scores, [n]."""
        return torch.stack([weight * self.scores[name] for name, weight in weights.items()]).sum(0)

    def gain(self, before: "Evaluation", weights: Mapping[str, float]) -> Gain:
        """How much better than `before`, over the images that both have."""
        known = {place: i for i, place in enumerate(map(tuple, before.places.tolist()))}
        pairs = [(known[place], i) for i, place in enumerate(map(tuple, self.places.tolist())) if place in known]
        theirs, mine = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
        return Gain.of(self.total(weights)[mine] - before.total(weights)[theirs], self.places[mine, 0])

    def save(self, path: Path) -> None:
        """Writes it as safetensors, atomically."""
        tensors = {"places": self.places, **{f"scores/{name}": values for name, values in self.scores.items()}}
        write_atomic(path, save(tensors, {"iteration": str(self.iteration)}))

    @staticmethod
    def load(path: Path) -> "Evaluation":
        """What `save` wrote. Raises UserError if the file is missing, damaged, or no evaluation."""
        require_ordinary(path, "The evaluation")
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                iteration = int(file.metadata()["iteration"])
            places = found.pop("places")
            scores = {name.removeprefix("scores/"): value for name, value in found.items()}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"The evaluation {path} cannot be read ({shown(error)}): delete it.") from None
        right = places.dtype == torch.int64 and places.dim() == 2 and places.shape[1] == 2 and len(places) > 0
        right = right and all(value.shape == places.shape[:1] and value.isfinite().all() for value in scores.values())
        if not right or not 0 <= iteration <= MOST_ITERATIONS:
            raise UserError(f"The evaluation {path} cannot be read (it holds other tensors): delete it.")
        return Evaluation(iteration, places, {name: value.float() for name, value in scores.items()})


def total(group: Group, weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of a group's scores, [G]."""
    return torch.stack([weight * group.scores[name] for name, weight in weights.items()]).sum(0)


def evaluation_weights(config: Config) -> dict[str, float]:
    """The weights of the reward that measures the gain; none where only people could tell it."""
    if config.evaluation.reward:
        return weights_of([RewardTerm(config.evaluation.reward)])
    return {} if any(term.name in PEOPLE for term in config.reward) else trained_weights(config)


def trained_weights(config: Config) -> dict[str, float]:
    """The weights of the reward that is trained: what "in-domain" means. One that is only a condition has none."""
    return {name: weight for name, weight in weights_of(config.reward).items() if weight}


def watched(config: Config) -> list[str]:
    """The rewards that are scored at each evaluation and never trained on, statistics last."""
    measuring = [config.evaluation.reward] if config.evaluation.reward else []
    names = dict.fromkeys([*measuring, *(term.name for term in config.watch), *STATISTICS])
    return [name for name in names if name not in trained_weights(config)]
