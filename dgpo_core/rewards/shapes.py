"""The rewards of the embedded model: does the picture show what the prompt asked for?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.demo.verifier import verify
from dgpo_core.demo.world import SIZE
from dgpo_core.rewards.base import Reward


class _Verified(Reward):
    """Needs the prompts of the embedded model's world."""

    range = (0.0, 1.0)

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if "include" not in prompt.metadata:
                raise UserError(
                    'The rewards shapes and shapes_graded need "include" in the metadata of every prompt, as the'
                    f" embedded model's own have it; {prompt.text!r} has none: take those prompts, or a reward that"
                    " judges any, such as brightness or pickscore."
                )


class Shapes(_Verified):
    """1 where count, shape, colour and relation are exactly as asked, else 0."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        self.check([Prompt(text, facts) for text, facts in zip(prompts, metadata, strict=True)])
        return torch.tensor([float(exact) for exact, _ in _verified(images, metadata)])


class ShapesGraded(_Verified):
    """The share of what was asked that is there; 1 exactly where `Shapes` is 1."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        self.check([Prompt(text, facts) for text, facts in zip(prompts, metadata, strict=True)])
        return torch.tensor([share for _, share in _verified(images, metadata)])


def _verified(images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> list[tuple[bool, float]]:
    if images.shape[-2:] != (SIZE, SIZE):
        raise UserError(f"The shapes rewards judge images of {SIZE} x {SIZE} pixels, not {tuple(images.shape[-2:])}.")
    pictures: np.ndarray = images.permute(0, 2, 3, 1).numpy()
    return [verify(picture, facts) for picture, facts in zip(pictures, metadata, strict=True)]
