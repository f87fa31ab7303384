"""What a reward is, and how groups are scored with several."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dgpo_core.errors import UserError
from dgpo_core.group import Group


class Reward(ABC):
    """Scores images; higher is better.

    range: lowest and highest score, where they are known.
    licence: of the weights; empty where there are none.
    download: what has to be downloaded, and how much; empty where nothing has.
    """

    range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))
    licence: ClassVar[str] = ""
    download: ClassVar[str] = ""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """images float32 [B, 3, H, W] in [0, 1] on the CPU, B prompts and B metadata -> float32 [B]."""

    def idle(self) -> None:  # noqa: B027 (most rewards hold nothing)
        """Give the accelerator's memory back; the next `score` takes it again."""


def score_groups(groups: Sequence[Group], rewards: Mapping[str, Reward]) -> list[Group]:
    """The groups with every reward's scores.

    Raises UserError, naming the reward and the sample, for a wrong shape or a score that is not a finite number.
    """
    if not groups:
        return []
    images = torch.cat([group.images for group in groups])
    prompts = [group.prompt.text for group in groups for _ in range(len(group))]
    metadata = [group.prompt.metadata for group in groups for _ in range(len(group))]
    scores = {name: checked(name, r.score(images, prompts, metadata), prompts) for name, r in rewards.items()}
    parts = {name: values.split([len(group) for group in groups]) for name, values in scores.items()}
    return [group.scored({name: parts[name][i] for name in parts}) for i, group in enumerate(groups)]


def checked(name: str, values: Tensor, prompts: Sequence[str]) -> Tensor:
    """What the reward `name` returned, float32 [B] on the CPU; raises UserError as `score_groups` does."""
    if values.shape != (len(prompts),):
        raise UserError(
            f"Reward {name!r} returned scores of shape {tuple(values.shape)} for {len(prompts)} images: it must return"
            " one number per image."
        )
    values = values.detach().float().cpu()
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise UserError(f"Reward {name!r} returned {values[i]} for sample {i} ({prompts[i]!r}): it must be a number.")
    return values


def runs(prompts: Sequence[str]) -> list[slice]:
    """Where the same prompt stands in a row: in `score`, a group, or groups of one prompt next to each other."""
    starts = [i for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]]
    return [slice(start, end) for start, end in itertools.pairwise([*starts, len(prompts)])]
