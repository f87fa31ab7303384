"""Forwards, backwards and decodings that are like earlier ones cost what those cost, and are not gone through again.

An iteration has thousands of them, of a dozen kinds. The engine's code runs in full around them: how many there are, in
which order, and what is kept between them, is what it decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dgpo_core.benchmark.count import Cost, Ledger
from dgpo_core.benchmark.weightless import standing_in
from dgpo_core.policy.base import Cond
from dgpo_core.policy.pipeline import DiffusersPolicy


class Repeats:
    """Stands in for `predict` and `decode` of a policy without storage, and for the backward through the former.

    A kind of forward: whether an adapter is on (all three are alike), the shapes of what it is given and how long its
    texts are, whether it will be gone back through. One forward at most is waiting for its backward at any time.
    """

    def __init__(self, policy: DiffusersPolicy, ledger: Ledger) -> None:
        self.policy, self.ledger = policy, ledger
        self._predict, self._decode, self._backward = policy.predict, policy.decode, Tensor.backward
        self._costs: dict[tuple[Any, ...], Cost] = {}
        self._left: set[tuple[Any, ...]] = set()  # kinds whose first forward left something behind, for those after it
        self._kind: tuple[Any, ...] = ()  # of the last forward with gradients
        self._waiting: int | None = None  # bytes of a forward that was not gone through, held for its backward

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Inside the block it does."""

        def backward(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            self.backward(tensor, *args, **kwargs)

        Tensor.backward = backward  # type: ignore[assignment, method-assign]
        try:
            with standing_in(self.policy, {"predict": self.predict, "decode": self.decode}):
                yield
        finally:
            Tensor.backward = self._backward  # type: ignore[method-assign]

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """As `Policy.predict`."""
        graded = torch.is_grad_enabled()
        kind = self.policy.adapters.active is None, tuple(x_t.shape), _told(cond), graded
        known = self._costs.get(kind)
        if graded:
            self._kind = kind
        if known is None:
            with self.ledger.span() as cost:
                answer = self._predict(x_t, t, cond)
            if not graded and cost.kept > answer.nbytes and kind not in self._left:
                self._left.add(kind)  # such as tables of places: the next one finds them there, and costs less
            else:
                self._costs[kind] = cost
            return answer
        self.ledger.repeat(known)
        answer = torch.empty(x_t.shape, device=x_t.device, dtype=torch.float32)
        if graded:
            self._waiting = known.kept - answer.nbytes
            self.ledger.hold(self._waiting)
            answer.requires_grad_()
        return answer

    def decode(self, latents: Tensor) -> Tensor:
        """As `Policy.decode`, but its pictures have one pixel: nobody looks at them."""
        kind = "decode", tuple(latents.shape)
        if kind in self._costs:  # a first decoding leaves nothing behind
            self.ledger.repeat(self._costs[kind])
        else:
            with self.ledger.span() as self._costs[kind]:
                self._decode(latents)
        return torch.empty(len(latents), 3, 1, 1, device=latents.device)

    def backward(self, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        """As `Tensor.backward`."""
        kind = "back", *self._kind
        if self._waiting is None:
            with self.ledger.span() as self._costs[kind]:
                self._backward(tensor, *args, **kwargs)
            return
        self.ledger.repeat(self._costs[kind])
        self.ledger.hold(-self._waiting)
        self._waiting = None
        self._backward(tensor, *args, **kwargs)


def _told(cond: Cond) -> tuple[Any, ...]:
    """What a forward's cost depends on in a conditioning: shapes and, of texts that go together, how long each is."""
    return tuple(
        tuple(tensor.sum(1).tolist()) if tensor.dtype == torch.bool else tuple(tensor.shape)
        for tensor in cond.tensors.values()
    )
