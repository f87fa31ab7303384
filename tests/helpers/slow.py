"""Rewards that wait, as for a server: for the tests and
`python -m dgpo_core.bench --reward tests/helpers/slow.py:Slow`."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgpo_core.rewards import Reward


class SlowAfter(Reward):
    """Brightness, after `seconds` per image in which the processor is free; scored when all groups are drawn."""

    range = (0.0, 1.0)

    def __init__(self, device: str = "cpu", seconds: float = 0.03) -> None:
        super().__init__(device)
        self.seconds = seconds

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        time.sleep(self.seconds * len(images))
        return images.mean((1, 2, 3))


class Slow(SlowAfter):
    """The same while the next groups are drawn."""

    def overlaps(self, device: torch.device, group_size: int) -> bool:
        return True
