"""One process or many: whole groups stay on one process, and only gradients and a few numbers cross.

Processes are started by `accelerate launch` or `torchrun`; without them everything here is free.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from dgpo_core.errors import UserError

T = TypeVar("T")


class World:
    """The processes of this run. rank in [0, size); `device` is this process's own."""

    def __init__(self, device: str = "auto") -> None:
        try:
            chosen = None if device == "auto" else torch.device(device)
        except RuntimeError:
            raise UserError(f"Unknown device {device!r}: use auto, cpu, cuda, cuda:1 or mps.") from None
        self._state = PartialState(cpu=device == "cpu")
        self.rank: int = self._state.process_index
        self.size: int = self._state.num_processes
        self.device: torch.device = chosen or self._state.device

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list that every process has: every size-th item."""
        return list(items[self.rank :: self.size])

    def gather(self, mine: Sequence[T]) -> list[T]:
        """What all processes have, on every process, taken from each in turn; so it is the inverse of `share`."""
        if self.size == 1:
            return list(mine)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(mine))
        missing = object()  # parts may be of any lengths
        rows = itertools.zip_longest(*parts, fillvalue=missing)
        return [item for row in rows for item in row if item is not missing]

    def add_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes; one message in all."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.detach().flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.detach().copy_(part.view_as(t))

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process."""
        if self.size == 1:
            return flag
        tensor = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(tensor)
        return bool(tensor.item())

    def close(self) -> None:
        """Leave the process group, without waiting for processes that may have failed."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
