"""Bytes and operations of whatever runs: every tensor that an operation of torch gives is looked at, by phase and kind.

It sees what torch dispatches, the backward and recomputed blocks among it, on tensors with storage and on tensors
without ("meta") alike. What an operation takes and gives back inside itself it cannot see.
"""

from __future__ import annotations

import operator
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

KINDS = ("base", "text encoders", "VAE", "adapters", "optimiser", "prompts", "activations")
"""What bytes are for. base: the frozen network; adapters: all three; optimiser: its moments and the gradients; prompts:
their embeddings; activations: all else."""

_aten = torch.ops.aten
_NO_KERNEL = {_aten._unsafe_view, _aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided}


def _attention_on_a_cpu(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_on_a_cpu_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_FLOPS = {  # torch knows the attention of accelerators
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_a_cpu,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_on_a_cpu_backward,
}


class Kernel(NamedTuple):
    """One operation on a device: FLOPs (a multiplication and an addition are two), bytes read and written, and the bits
    of the numbers that are multiplied. crosses: whether it brings bytes over the bus, beside what the device does."""

    flops: int
    moved: int
    bits: int
    crosses: bool = False


@dataclass
class Cost:
    """What a stretch of work took. peak: by kind, the most bytes above what was live at its start; kept: those that are
    live after it."""

    peak: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    kernels: Counter[Kernel] = field(default_factory=Counter)

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return sum(kernel.flops * times for kernel, times in self.kernels.items())


@dataclass
class Phase:
    """What one phase took. peak: the most bytes that were live in it, by kind; forwards, backwards: of images; images:
    of an evaluation, those that were drawn."""

    peak: dict[str, int] = field(default_factory=dict)
    kernels: Counter[Kernel] = field(default_factory=Counter)
    forwards: int = 0
    backwards: int = 0
    calls: int = 0
    images: int = 0

    @property
    def bytes(self) -> int:
        """The most bytes that were live."""
        return sum(self.peak.values())

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return sum(kernel.flops * times for kernel, times in self.kernels.items())


class Answering(Protocol):
    """Answers operations in the place of torch."""

    def question(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable | None:
        """What is the same for operations whose answers take the same bytes and work; None where it cannot be said."""

    def answer(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], question: Hashable | None = None
    ) -> Any:
        """What the operation gives; question: what `question` gave for it."""


class _Span:
    """A stretch of work that is being looked at."""

    def __init__(self, live: Mapping[str, int]) -> None:
        self.before = self.at = dict(live)
        self.most, self.kernels = sum(live.values()), Counter[Kernel]()


class Ledger(TorchDispatchMode):
    """Counts while it is the active mode; tensors that are there before must be told by `own`.

    device: the one whose bytes are counted. workspace: the bytes that an operation, given with its arguments, takes
    while it works. answers: who answers in the place of torch. `phases` holds what was counted, by the names that
    `phase` was given.
    """

    def __init__(
        self,
        device: torch.device,
        workspace: Callable[[Any, Sequence[Any]], int] = lambda *_: 0,
        answers: Answering | None = None,
    ) -> None:
        super().__init__()
        self.device, self.workspace, self.answers = device, workspace, answers
        self._is_here = operator.attrgetter("is_meta" if device.type == "meta" else "is_" + device.type)
        self.phases: dict[str, Phase] = {}
        self.live = dict.fromkeys(KINDS, 0)
        self._total = 0
        self._held: dict[int, tuple[Any, int, str]] = {}  # by storage: its weak reference, bytes, kind
        self._phase: Phase | None = None
        self._spans: list[_Span] = []
        self._known_flops: dict[tuple[Any, tuple[Any, ...]], int] = {}
        self._known: dict[Hashable, tuple[int, Kernel | None]] = {}  # by question: workspace and kernel

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and keeping the compiler out takes longer than the counting

    # --- what is live ------------------------------------------------------------------------------------------------

    def own(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """The tensors' storages are of this kind from now on."""
        for tensor in tensors:
            if tensor is not None and tensor.device.type == self.device.type:
                self._hold(tensor.untyped_storage(), kind)

    @property
    def total(self) -> int:
        """All bytes that are live."""
        return self._total

    def hold(self, count: int, kind: str = "activations") -> None:
        """`count` bytes more (or, below 0, fewer) are live, without a tensor."""
        self.live[kind] += count
        self._total += count
        if count > 0:
            self._look()

    def _hold(self, storage: UntypedStorage, kind: str) -> None:
        key = storage._cdata
        known = self._held.get(key)
        if known:
            if known[2] != kind:
                self._held[key] = known[0], known[1], kind
                self.live[known[2]] -= known[1]
                self.live[kind] += known[1]
            return
        size = storage.nbytes()
        self._held[key] = weakref.ref(storage, lambda _: self._drop(key)), size, kind
        self.live[kind] += size
        self._total += size

    def _drop(self, key: int) -> None:
        _, size, kind = self._held.pop(key)
        self.live[kind] -= size
        self._total -= size

    def _look(self, extra: int = 0, by_kind: Mapping[str, int] | None = None) -> None:
        """Is this the most so far? extra: bytes on top of what is live, of activations where `by_kind` does not say."""
        total, phase = self._total + extra, self._phase
        higher = [span for span in self._spans if total > span.most]
        first = phase is not None and total > phase.bytes
        if not higher and not first:
            return
        more = {"activations": extra} if by_kind is None else by_kind
        at = {kind: count + more.get(kind, 0) for kind, count in self.live.items()}
        for span in higher:
            span.most, span.at = total, at
        if phase is not None and first:
            phase.peak = at

    # --- stretches of work -------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """What runs inside belongs to this phase alone, and not to one around it."""
        before, self._phase = self._phase, self.phases.setdefault(name, Phase())
        self._look()
        try:
            yield self._phase
        finally:
            self._phase = before

    @property
    def current(self) -> Phase:
        """The phase that is counted now. Raises ValueError outside of all."""
        if self._phase is None:
            raise ValueError("nothing is counted outside of a phase")
        return self._phase

    @contextmanager
    def span(self) -> Iterator[Cost]:
        """The cost of what runs inside, filled in at the end; it is counted as always."""
        cost, span, before = Cost(), _Span(self.live), self._total
        self._spans.append(span)
        try:
            yield cost
        finally:
            self._spans.remove(span)
            cost.peak = {kind: count - span.before[kind] for kind, count in span.at.items()}
            cost.kept, cost.kernels = self._total - before, span.kernels

    def repeat(self, cost: Cost) -> None:
        """Counts a cost again, as if the work were done once more; what it keeps is not held."""
        self._look(sum(cost.peak.values()), cost.peak)
        for counter in self._counters():
            counter.update(cost.kernels)

    def _counters(self) -> list[Counter[Kernel]]:
        return [place.kernels for place in (self._phase, *self._spans) if place is not None]

    # --- every operation ---------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, answers = kwargs or {}, self.answers
        if func.is_view:
            out = func(*args, **kwargs)
            if self._hold_all(_tensors((out,))):
                self._look()
            return out
        question = answers.question(func, args, kwargs) if answers else None
        out = answers.answer(func, args, kwargs, question) if answers else func(*args, **kwargs)
        given = [x for x in _tensors((out,)) if self._is_here(x)]
        if not given:
            return out
        self._hold_all(given)
        known = self._known.get(question) if question else None
        if known is None:
            known = self.workspace(func, args), self._kernel(func, args, kwargs, out, given)
            if question:
                self._known[question] = known
        extra, kernel = known
        self._look(extra)
        if kernel is not None:
            for counter in self._counters():
                counter[kernel] += 1
        return out

    def _hold_all(self, tensors: Iterable[Tensor]) -> bool:
        """Whether any of them is on the device that was not known there."""
        any_new = False
        for tensor in tensors:
            if self._is_here(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._held:
                    self._hold(storage, "activations")
                    any_new = True
        return any_new

    def _kernel(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any, given: Sequence[Tensor]
    ) -> Kernel | None:
        if func.overloadpacket in _NO_KERNEL:
            return None
        taken = _tensors((*args, *kwargs.values()))
        return Kernel(
            flops=self._flops(func, args, kwargs, out) if func.overloadpacket in _FLOPS else 0,
            moved=sum(_bytes(x) for x in (*taken, *given)),
            bits=8 * (taken or given)[0].element_size(),
            crosses=bool(kwargs.get("non_blocking")),  # as all that comes from main memory is copied
        )

    def _flops(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
        """As torch has it for these shapes, asked once: its formulas take longer than what they count."""
        shapes = tuple(x.shape if isinstance(x, Tensor) else str(x) for x in (*args, *kwargs.items()))
        if (func, shapes) not in self._known_flops:
            self._known_flops[func, shapes] = _FLOPS[func.overloadpacket](*args, **kwargs, out_val=out)
        return self._known_flops[func, shapes]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
