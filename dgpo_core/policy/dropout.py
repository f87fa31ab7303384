"""LoRA dropout whose masks belong to the sample, not to the batch that it happens to be in.

A mask is a function of the sample's seed and the layer's name. So a group that is cut into micro-batches, or is on
another process, or is computed again for the backward, sees the masks that it would see otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dgpo_core.common.errors import UserError
from dgpo_core.common.seeds import derive_seed


class Dropout:
    """The dropout of one adapter: off, but for the blocks of `dropping`.

    p: share of a branch's input that is set to zero, 0 <= p < 1; the rest is divided by 1 - p. is_on: whether any is.
    """

    def __init__(self, p: float) -> None:
        self.p = p
        self._seeds: tuple[int, ...] = ()
        self.is_on = False

    @contextmanager
    def dropping(self, seeds: Sequence[int]) -> Iterator[None]:
        """Inside the block it is on; seeds: one of each row of the batches that come."""
        before = self._seeds
        self._drop(tuple(seeds))
        try:
            yield
        finally:
            self._drop(before)

    def _drop(self, seeds: tuple[int, ...]) -> None:
        self._seeds, self.is_on = seeds, bool(seeds) and self.p > 0

    def dropping_rows(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        """Inside the block the batches that come are of these rows alone, of those that there are seeds for."""
        return self.dropping([self._seeds[i] for i in rows] if self._seeds else ())

    def remembering(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function under the seeds of now, whenever it is called: for what a backward computes again."""
        seeds = self._seeds

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.dropping(seeds):
                return function(*args, **kwargs)

        return run

    def __call__(self, x: Tensor, layer: str) -> Tensor:
        """x [B, ...] as the layer's branch sees it; see `mask`."""
        return x * self.mask(x, layer) if self.is_on else x

    def mask(self, x: Tensor, layer: str) -> Tensor:
        """What x [B, ...] is multiplied by while it is on, of its shape and type.

        B is the number of seeds, or a multiple where an engine puts several conditionings of the same rows, one after
        the other, into one batch: a sample has the same mask under all of them. Raises UserError for another B.
        """
        if not len(x) or len(x) % len(self._seeds):
            raise UserError(f"The layer {layer} mixes the images of a batch: set the LoRA dropout to 0.")
        masks = torch.stack([self._mask(x, derive_seed(seed, layer)) for seed in self._seeds])
        return masks.repeat(len(x) // len(masks), *[1] * (x.ndim - 1))

    def _mask(self, x: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)
        kept = torch.rand(x.shape[1:], device=x.device, generator=generator) >= self.p
        return kept.to(x.dtype) / (1 - self.p)


class LayerDropout(nn.Module):
    """`Dropout` of one layer as a module, in the place of peft's own."""

    def __init__(self, dropout: Dropout, layer: str) -> None:
        super().__init__()
        self._dropout, self._layer = dropout, layer

    def forward(self, x: Tensor) -> Tensor:
        return self._dropout(x, self._layer)
