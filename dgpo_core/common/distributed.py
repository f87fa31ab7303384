"""One process or many: whole groups stay on one process, and only gradients and a few numbers cross.

Processes are started by `accelerate launch` or `torchrun`; without them everything here is free. What crosses goes
through the processors (gloo), also between accelerators: it is some megabytes an iteration, and a process that dies
ends all others at once, where NCCL would wait for it.
"""

import atexit
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from dgpo_core.common.errors import Elsewhere, UserError
from dgpo_core.common.peers import FOR_EVER, Peers
from dgpo_core.common.reading import shown

T = TypeVar("T")
_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # sets others; accelerate reads them


class World:
    """The processes of this run. rank in [0, size); `device` is this process's own."""

    def __init__(self, device: str = "auto") -> None:
        chosen = None if device == "auto" else _device(device)
        several = {"backend": "gloo"} if _are_several() else {}
        self._state = PartialState(cpu=device == "cpu", **several)
        self.rank: int = self._state.process_index
        self.size: int = self._state.num_processes
        # not before: with several processes "cuda" is the card that the state has given to each
        self.device: torch.device = _present(chosen) if chosen else self._state.device
        self._group: dist.ProcessGroup | None = None
        self._peers: Peers | None = None
        if self.size > 1:
            # every process is in it, so it is none of the other things that `new_group` can give
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=FOR_EVER))
            self._peers = Peers(self.rank, self.size)
            atexit.register(self.close)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this process tells the user of an error: the first one, and once that is gone the next."""
        return self._peers is None or self._peers.speaks

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list that every process has: every size-th item."""
        return list(items[self.rank :: self.size])

    def gather(self, mine: Sequence[T]) -> list[T]:
        """What all processes have, on every process, taken from each in turn; so it is the inverse of `share`."""
        if self.size == 1:
            return list(mine)
        parts: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(parts, list(mine), group=self._group)
        missing = object()  # parts may be of any lengths
        rows = itertools.zip_longest(*parts, fillvalue=missing)
        return [item for row in rows for item in row if item is not missing]

    def add_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes; one message in all."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.detach().flatten() for t in tensors]).cpu()
        with self._talking():
            dist.all_reduce(flat, group=self._group)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.detach().copy_(part.view_as(t))

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process."""
        if self.size == 1:
            return flag
        return any(self.gather([flag]))

    def check(self) -> None:
        """Raises UserError once another process has failed or is gone, and Interrupted once one was stopped.

        On all processes but the one that talks to the user, the UserError is `Elsewhere`.
        """
        if self._peers:
            self._peers.check()

    def leave(self, error: BaseException | None = None) -> None:
        """Tell the others at once that this process leaves, and by what error. Only the first call counts."""
        if self._peers:
            self._peers.leave(error)

    def close(self) -> None:
        """Leave the process group, without waiting for processes that may have failed."""
        if self._peers and dist.is_initialized():
            self._peers.close()
            dist.destroy_process_group()

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Around a message to all: where it fails, another process has left, and what it says is raised."""
        self.check()
        try:
            yield
        except RuntimeError:
            if self._peers:
                self._peers.explain()
            raise


def _device(name: str) -> torch.device:
    """Raises UserError for what is no device."""
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"Unknown device {name!r}: use auto, cpu, cuda, cuda:1 or mps.") from None


def _present(device: torch.device) -> torch.device:
    """The device. Raises UserError where this machine has none that can compute."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch is built without it
        why = shown(str(error).strip().split("\n")[0].rstrip("."))
        raise UserError(f"The device {device} is not there: {why}.") from None
    return device


def _are_several() -> bool:
    """Whether a launcher has started several processes, by what it has set in the environment.

    Raises UserError for what no launcher sets so: what an earlier one, a container or a shell's profile has left.
    """
    for name in _NUMBERS:
        value = os.environ.get(name, "1")
        if not re.fullmatch(r"-?\d{1,9}", value):
            raise UserError(f"{name} is {shown(value, 60)!r} in the environment and must be a number: {_advice(name)}")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    missing = [name for name in (*_NUMBERS, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing and not any(name in os.environ for name in _BY_MPI):
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment but {missing[0]} is not set, so no launcher"
            f" has started these processes: {_advice('WORLD_SIZE')}"
        )
    return True


def _advice(name: str) -> str:
    return f"unset {name}, or start with accelerate launch."


@contextmanager
def together(device: str = "auto") -> Iterator[World]:
    """The processes of this run. An error that ends one of them ends all, and one of them tells the user."""
    world = World(device)
    try:
        yield world
    except BaseException as error:
        world.leave(error)
        if isinstance(error, UserError) and not world.speaks:
            raise Elsewhere(str(error)) from error
        raise
    finally:
        world.close()
