"""Rewards that tell images of a tiny random model apart; `python tests/helpers/bright.py ARGS` trains with them."""

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgpo_core.rewards import REWARDS, Reward

NAMES = {"bright": "bright:Bright", "flat": "bright:Flat", "flat_blue": "bright:FlatBlue", "red": "bright:Red"}


class Bright(Reward):
    """How bright the image is: smooth, simple, and another number for every image."""

    range = (0.0, 1.0)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return images.mean((1, 2, 3))


class Red(Bright):
    """How bright the first channel is."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return images[:, 0].mean((1, 2))


class Flat(Reward):
    """The same for every image."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return torch.full((len(images),), 0.3)


class FlatBlue(Bright):
    """Brightness, but the same for all images of the prompt "blue"."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return torch.where(torch.tensor([p == "blue" for p in prompts]), 0.3, images.mean((1, 2, 3)))


def register(put: Callable[[dict[str, str], str, str], None] = operator.setitem) -> None:
    """Adds these rewards to those that settings can name."""
    for name, where in NAMES.items():
        put(REWARDS, name, where)


if __name__ == "__main__":
    from dgpo_core.train import main

    torch.set_num_threads(1)
    register()
    sys.exit(main())
