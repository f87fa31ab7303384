"""What a reward is: how it scores, and what it says of itself."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.packages import is_installed, missing
from dgpo_core.common.prompts import Prompt
from dgpo_core.rewards.weight_files import Weights

WEIGHTS_FILE = "weights_file"
"""The option, of every reward that takes one, with the name of a file in the folder of reward models; `AUTOMATIC` where
the weights are found without it. It leads nowhere else, so what is shared may set it."""
AUTOMATIC = "automatic"


class Reward(ABC):
    """Scores images. What a class says of itself:

    range: lowest and highest score, where they are known.
    higher_is_better: False where a low score is a good image; training then turns the sign of its weight.
    licence: of the weights; empty where there are none.
    weights: what it downloads, how much that is, and the option that names a copy (`weights.find` says where it looks).
    file_option: the option that may be set by `WEIGHTS_FILE`, too; empty where no file can be chosen.
    packages: what has to be installed for it, {module: name for pip}.
    shareable: the options that somebody else's file (a workflow) may set. No address, no path, no name of a variable
    and nothing that costs without bound is among them; what is not named here only the machine's own user can set.
    retired: options that it once took, each with what to do instead.
    needs_source: whether it can judge only what was made from a source picture (see `score_edits`).

    A constructor takes `device` and the reward's options, and raises UserError where it cannot score later.
    """

    range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))
    higher_is_better: ClassVar[bool] = True
    licence: ClassVar[str] = ""
    weights: ClassVar[tuple[Weights, ...]] = ()
    file_option: ClassVar[str] = ""
    packages: ClassVar[Mapping[str, str]] = {}
    shareable: ClassVar[tuple[str, ...]] = ()
    retired: ClassVar[Mapping[str, str]] = {}
    needs_source: ClassVar[bool] = False

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    @classmethod
    def sources(cls, options: Mapping[str, Any]) -> list[tuple[Weights, Any]]:
        """What a reward with these options needs of `weights`, each with what its option says."""
        return [(weights, options.get(weights.option, "")) for weights in cls.weights]

    @classmethod  # noqa: B027 (most rewards need nothing else)
    def require(cls, options: Mapping[str, Any]) -> None:
        """Raises UserError where something besides packages and weights is missing; loads and asks nothing."""

    @classmethod
    def asks(cls, options: Mapping[str, Any]) -> str:
        """The server that images are sent to, for people to read; empty where they stay on this machine."""
        return ""

    def check(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027 (most rewards can judge any prompt)
        """Raises UserError for a prompt that cannot be judged. Called before the first images are drawn."""

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """images float32 [B, 3, H, W] in [0, 1] on the CPU, B prompts and B metadata -> float32 [B].

        Groups are never divided: all images of a group are in one call, next to each other and with the same prompt. So
        a reward can score an image by the others of its group (`runs` finds them).
        """

    def score_edits(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        sources: Sequence[Sequence[Tensor]],
    ) -> Tensor:
        """`score`, with the pictures that each image was made from: what the engine calls.

        sources: of each of the B images, those of its prompt, float32 [3, h, w] in [0, 1] of any sizes; none where the
        prompt brought none. A reward that does not look at them has `score` alone.
        """
        return self.score(images, prompts, metadata)

    def overlaps(self, device: torch.device, group_size: int) -> bool:
        """Whether to score group by group while the next groups of `group_size` images are drawn on `device`.

        That is faster where scoring leaves `device` alone, on a server or another processor, and needs no more than
        one group at a time. `score` is then called from another thread, never twice at once.
        """
        return False

    def idle(self) -> None:  # noqa: B027 (most rewards hold nothing)
        """Give the accelerator's memory back; the next `score` takes it again."""

    def close(self) -> None:  # noqa: B027 (most rewards hold nothing)
        """The run is over: let go of everything."""


class EditReward(Reward):
    """Compares images with the pictures that they were made from: `score_edits` is its `score`."""

    needs_source = True

    @abstractmethod
    def score_edits(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        sources: Sequence[Sequence[Tensor]],
    ) -> Tensor:
        """As `Reward.score_edits`; every image has a source."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Images alone are not enough."""
        raise UserError(f"{type(self).__name__} compares images with their sources, and there are none.")


class GroupReward(Reward):
    """Scores groups as they were drawn, with more of them than their images."""

    @abstractmethod
    def score_groups(self, groups: Sequence[Group]) -> Tensor:
        """The scores of all images, one group after the other, float32 [B]."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Images alone are not enough."""
        raise UserError(f"{type(self).__name__} scores the groups of a training, not images by themselves.")


def need_packages(reward: str, packages: Mapping[str, str]) -> None:
    """Raises UserError, with what to install, where one of them is missing."""
    for module in packages:
        if not is_installed(module):
            raise missing(f"The reward {reward!r}", packages[module], " ".join(packages.values()))


def runs(prompts: Sequence[str]) -> list[slice]:
    """Where the same prompt stands in a row: in `score`, a group, or groups of one prompt next to each other."""
    starts = [i for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]]
    return [slice(start, end) for start, end in itertools.pairwise([*starts, len(prompts)])]
