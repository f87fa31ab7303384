"""Forwards, backwards, draws and decodings that are like earlier ones cost what those cost, and are not gone through
again.

An iteration has thousands of them, of a dozen kinds. The engine's code runs in full around them: how many there are, in
which order, and what is kept between them, is what it decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from dgpo_core.benchmark.count import Cost, Ledger
from dgpo_core.benchmark.weightless import standing_in
from dgpo_core.diffusion.solvers import SchedulerSolver, Solver
from dgpo_core.policy.base import Check, Cond
from dgpo_core.policy.pipeline import DiffusersPolicy


class Repeats:
    """Stands in for `predict`, `sample` and `decode` of a policy without storage, and for backwards.

    A kind of forward: whether an adapter is on (all three are alike), the shapes of what it is given and how long its
    texts are, whether it will be gone back through. One forward at most is waiting for its backward at any time.
    """

    def __init__(self, policy: DiffusersPolicy, ledger: Ledger) -> None:
        self.policy, self.ledger = policy, ledger
        self._predict, self._decode, self._backward = policy.predict, policy.decode, Tensor.backward
        self._sample = policy.sample
        self._costs: dict[tuple[Any, ...], Cost] = {}
        self._asked: dict[tuple[Any, ...], tuple[int, int]] = {}  # by kind of draw: calls, and images in them
        self._remembered: dict[int, int] = {}  # by solver: bytes that it keeps of a draw that was not gone through
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
            with standing_in(self.policy, {"predict": self.predict, "sample": self.sample, "decode": self.decode}):
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

    def sample(self, solver: Solver, x_T: Tensor, cond: Cond, uncond: Cond, cfg: float, check: Check) -> Tensor:
        """As `Policy.sample`."""
        alone = self.policy.adapters.active is None
        kind = "draw", id(solver), alone, tuple(x_T.shape), _told(cond), _told(uncond), cfg
        made_here = cast(SchedulerSolver, solver)  # by the policy's `solver`
        made_here.forget()
        self.ledger.hold(-self._remembered.pop(id(solver), 0))
        if kind not in self._costs:
            return self._gone_through(kind, made_here, x_T, cond, uncond, cfg, check)
        cost, phase = self._costs[kind], self.ledger.current
        self.ledger.repeat(cost)
        phase.calls += self._asked[kind][0]
        phase.forwards += self._asked[kind][1]
        answer = torch.empty(x_T.shape, device=self.policy.device, dtype=torch.float32)
        self._remembered[id(solver)] = cost.kept - answer.nbytes
        self.ledger.hold(self._remembered[id(solver)])
        return answer

    def _gone_through(self, kind: tuple[Any, ...], solver: Solver, x_T: Tensor, *rest: Any) -> Tensor:
        """A draw of this kind. The first may leave something behind, such as tables of places: the second is kept."""
        phase = self.ledger.current
        before = phase.calls, phase.forwards
        with self.ledger.span() as cost:
            answer = self._sample(solver, x_T, *rest)
        if kind in self._left:
            self._costs[kind] = cost
            self._asked[kind] = phase.calls - before[0], phase.forwards - before[1]
        self._left.add(kind)
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
