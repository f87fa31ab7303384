"""Rewards with networks: scored in batches, in their own number type, and off the accelerator when idle."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dgpo_core.common.errors import UserError
from dgpo_core.rewards.base import Reward

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ModelReward(Reward):
    """A reward that computes with networks.

    dtype: "float32", "float16", "bfloat16", or "auto": float32 on a CPU, else float16 (a cosine in bfloat16 is too
    coarse to tell the images of a group apart). batch: images per forward. Raises UserError for other values.
    """

    shareable: ClassVar[tuple[str, ...]] = ("dtype", "batch")

    def __init__(self, device: str = "cpu", dtype: str = "auto", batch: int = 16) -> None:
        super().__init__(device)
        if dtype != "auto" and dtype not in DTYPES:
            raise UserError(f"A reward's dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}.")
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise UserError(f"A reward's batch must be a whole number of at least 1, not {batch!r}.")
        automatic = torch.float32 if torch.device(device).type == "cpu" else torch.float16
        self.dtype, self.batch = DTYPES.get(dtype, automatic), batch

    @abstractmethod
    def networks(self) -> Sequence[nn.Module]:
        """The networks that `score_batch` uses."""

    @abstractmethod
    def score_batch(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """`score` of at most `batch` images, with the networks on the device and no gradients."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        self._to(self.device)
        parts = []
        with torch.inference_mode():
            for start in range(0, len(images), self.batch):
                part = slice(start, start + self.batch)
                parts.append(self.score_batch(images[part], prompts[part], metadata[part]).float().cpu())
        return torch.cat(parts) if parts else torch.zeros(0)

    def idle(self) -> None:
        self._to("cpu")

    def _to(self, device: str) -> None:
        for network in self.networks():
            network.to(device)
