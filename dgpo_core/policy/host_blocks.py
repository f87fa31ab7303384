"""A frozen network larger than the card: its blocks' weights stay in main memory, and come to the device in turn.

Autograd keeps nothing of a frozen Linear's weight (`frozen_linear`), so the backward brings the same weights once more,
in the other direction. While one block works the next is on its way; which is next, is what it was the last time.

diffusers' own group offloading is not taken: it moves parameters by hooks on modules' forwards, of which a backward
knows nothing (Flux's gradients were NaN).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgpo_core.policy.frozen_linear import frozen_linear
from dgpo_core.policy.quantised import QuantisedLinear

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all devices


@dataclass
class _Copies:
    """One block's weights on the device, by layer and part; arrived: once they are there, None where they are."""

    layers: Mapping[str, Mapping[str, Tensor]]
    arrived: Any = None


class Blocks:
    """Brings blocks to a device: the one that is asked for, and with it the one that came after it before.

    Three at most are there: the one that works, the one before, whose work may still be waiting on the device, and the
    next. How far the processor may run ahead of the device is bounded by that.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.there: dict[int, _Copies] = {}
        self._kept: list[dict[str, Mapping[str, Tensor]]] = []  # by block and layer, in main memory
        self._place: tuple[int, int, str] = (-1, -1, "")  # the block before, the one that works, and what for
        self._next: dict[tuple[int, int, str], int] = {}
        self._done: Any = None  # once the block before has worked
        self._stream: Any = None

    def add(self, layers: Mapping[str, Mapping[str, Tensor]]) -> int:
        """One block more: the parts of its layers' weights in main memory, by name. Returns its number."""
        self._kept.append({name: _pinned(parts, self.device) for name, parts in layers.items()})
        return len(self._kept) - 1

    @property
    def bytes(self) -> int:
        """What lies in main memory."""
        return sum(part.nbytes for layers in self._kept for parts in layers.values() for part in parts.values())

    def parts(self, block: int, layer: str, purpose: str) -> Mapping[str, Tensor]:
        """The parts of one layer's weight on the device, until two other blocks were asked for.

        purpose: "forward", "graded" (a forward that will be gone back through) or "backward": what follows a block
        depends on it.
        """
        if block != self._place[1]:
            self._turn_to(block, purpose)
        return self.there[block].layers[layer]

    def move(self, device: torch.device) -> None:
        """From now on they are brought to another device."""
        self.there.clear()
        self.device, self._done, self._place = device, None, (-1, -1, "")

    def _turn_to(self, block: int, purpose: str) -> None:
        _, before, _ = self._place
        self._next[self._place] = block
        self._place = before, block, purpose
        after = self._next.get(self._place)
        self._wait_for_the_one_before()
        for other in set(self.there) - {before, block, after}:
            del self.there[other]
        for wanted in (block, after):
            if wanted is not None and wanted not in self.there:
                self.there[wanted] = self._brought(wanted)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_event(self.there[block].arrived)

    def _wait_for_the_one_before(self) -> None:
        """Until what was queued when the last block was turned to is done: the block before that one is free then."""
        if self.device.type != "cuda":
            return
        if self._done is not None:
            self._done.synchronize()
        self._done = torch.cuda.current_stream(self.device).record_event()

    def _brought(self, block: int) -> _Copies:
        def copies() -> dict[str, dict[str, Tensor]]:
            return {
                name: {key: part.to(self.device, non_blocking=True, copy=True) for key, part in parts.items()}
                for name, parts in self._kept[block].items()
            }

        if self.device.type != "cuda":
            return _Copies(copies())
        if self._stream is None or self._stream.device != self.device:
            self._stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            return _Copies(copies(), self._stream.record_event())


class HostLinear(QuantisedLinear):
    """A frozen Linear whose weight is in main memory; `linear` is what it was, and is empty afterwards."""

    def __init__(self, linear: nn.Linear, name: str) -> None:
        weight = linear.weight
        super().__init__(weight.shape, weight.dtype, linear.bias)
        self._name = name
        self._blocks: Blocks | None = None
        self._block = -1
        self._made: Callable[[Mapping[str, Tensor], torch.dtype], Tensor]
        self._made = linear.made if isinstance(linear, QuantisedLinear) else _cast
        self.train(linear.training)

    def belong(self, blocks: Blocks, block: int) -> None:
        """Its weight is in this block."""
        self._blocks, self._block = blocks, block

    def made(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return self._made(parts, dtype)

    def parts(self) -> dict[str, Tensor]:
        return dict(self._brought("forward"))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Its shape, number type and device, for those who look; it has one number."""
        device = self._blocks.device if self._blocks else None
        return torch.empty(1, 1, dtype=self._dtype, device=device).expand(self.out_features, self.in_features)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        purpose = "graded" if torch.is_grad_enabled() else "forward"
        product = functools.partial(self._multiply, purpose)
        return frozen_linear(x, product, functools.partial(self._borrowed, x.dtype))

    def _multiply(self, purpose: str, x: Tensor) -> Tensor:
        return F.linear(x, self.made(self._brought(purpose), x.dtype), self.bias)

    @contextmanager
    def _borrowed(self, dtype: torch.dtype) -> Iterator[Tensor]:
        yield self.made(self._brought("backward"), dtype)

    def _brought(self, purpose: str) -> Mapping[str, Tensor]:
        if self._blocks is None:
            raise ValueError("a layer of no block")
        return self._blocks.parts(self._block, self._name, purpose)


def keep_on_host(network: nn.Module, device: torch.device, repeated: Collection[str]) -> Blocks:
    """Makes the Linears of a network's repeated blocks `HostLinear`s, in place; the rest of it is not moved.

    repeated: names of the blocks' classes. device: where the network will work.
    """
    blocks = Blocks(device)
    for block in [module for module in network.modules() if type(module).__name__ in repeated]:
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        distant = {name: HostLinear(linear, name) for name, linear in linears.items()}
        number = blocks.add({name: _taken(linear) for name, linear in linears.items()})
        for name, layer in distant.items():
            layer.belong(blocks, number)
            within, _, last = name.rpartition(".")
            setattr(block.get_submodule(within), last, layer)
    return blocks


def _taken(linear: nn.Linear) -> dict[str, Tensor]:
    """What a Linear's weight is kept as, and the Linear has no longer."""
    if not isinstance(linear, QuantisedLinear):
        return {"weight": linear.weight.detach()}
    parts = linear.parts()
    linear._buffers.clear()
    return parts


def _cast(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    return parts["weight"].to(dtype)


def _pinned(parts: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """In main memory of their own, which a CUDA device can read while the processor does something else.

    It is pinned where it lies: torch's own pinned memory comes in powers of two, up to twice of what is needed. Where
    the system refuses, copies are slower and the same.
    """
    if device.type != "cuda":
        return dict(parts)
    own = {name: part.to("cpu", copy=True).contiguous() for name, part in parts.items()}
    runtime = torch.cuda.cudart()
    for part in own.values():
        if int(runtime.cudaHostRegister(part.data_ptr(), part.nbytes, _PORTABLE)) == 0:
            weakref.finalize(part, runtime.cudaHostUnregister, part.data_ptr())
    return own
