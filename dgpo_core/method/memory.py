"""Batches that fit: work that runs out of an accelerator's memory is done again in smaller ones."""

from collections.abc import Callable
from typing import TypeVar

import torch

from dgpo_core.common.errors import UserError

Done = TypeVar("Done")


def _nothing() -> str:
    return ""


def within_memory(
    work: Callable[[int], Done],
    batch: int,
    whole: int,
    tell: Callable[[str], None] = print,
    make_room: Callable[[], str] = _nothing,
) -> tuple[Done, int]:
    """work(batch), again with half the batch whenever the accelerator runs out of memory; and the batch that did it.

    batch: samples at once, 0 for all. whole: how many samples there are. make_room: asked where one is too many; says
    what it did, or "" where there is nothing left to do. Raises UserError where one is too many all the same.
    """
    while True:
        try:
            return work(batch), batch
        except torch.OutOfMemoryError:
            size = min(batch or whole, whole)
            done = f"going on with {size // 2}" if size > 1 else make_room()
            if not done:
                raise UserError(
                    "The accelerator's memory is too small for one sample: turn on memory.gradient_checkpointing"
                    " and memory.offload, or choose a smaller image size."
                ) from None
            batch = max(1, size // 2)
        torch.cuda.empty_cache()
        tell(f"Out of memory with {size} sample{'s' * (size > 1)} at once: {done}.")
