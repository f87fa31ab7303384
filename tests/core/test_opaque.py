"""A frozen Linear that a compiler takes as it is: the numbers of `frozen_linear`, and one graph for many layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from dgpo_core.policy.frozen_linear import LoraBank, frozen_linear
from dgpo_core.policy.opaque import OpaqueLinear

NAMES = ("one", "two")


class Twins:
    """Two Linears and a bank on them, in both ways."""

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.linears = {name: nn.Linear(6, 4).requires_grad_(False) for name in NAMES}
        shapes = dict.fromkeys(NAMES, (4, 6))
        self.bank = LoraBank(shapes, rank=2, alpha=4.0, dropout=dropout, seed=0, device=torch.device("cpu"))
        with torch.no_grad():
            for parameter in self.bank.state("current").values():
                parameter.normal_()
        self.opaque = {name: self._opaque(name) for name in NAMES}

    def _opaque(self, name: str) -> OpaqueLinear:
        layer = OpaqueLinear(name, (4, 6), lambda dtype, device: self.lent(name), self.bank)
        layer.product = self.linears[name].forward
        return layer

    @contextmanager
    def lent(self, name: str) -> Iterator[Tensor]:
        yield self.linears[name].weight

    def plain(self, name: str, x: Tensor) -> Tensor:
        y = frozen_linear(x, self.linears[name].forward, lambda: self.lent(name))
        return self.bank.add(name, x, y)

    def gradients(self, out: Tensor, x: Tensor) -> list[Tensor]:
        parameters = [p for key, p in self.bank.state("current").items() if key.startswith("one")]
        return list(torch.autograd.grad(out.square().sum(), [x, *parameters]))


@pytest.mark.parametrize("active", ["current", "old", None])
def test_it_is_the_frozen_linear_with_its_branch(active: str | None) -> None:
    twins, x = Twins(), torch.randn(3, 5, 6)
    with twins.bank.using(active), torch.no_grad():
        assert torch.equal(twins.opaque["one"](x), twins.plain("one", x))


def test_gradients_and_dropout_masks_are_the_same() -> None:
    twins, x = Twins(dropout=0.5), torch.randn(3, 5, 6, requires_grad=True)
    with twins.bank.dropping([1, 2, 3]):
        outs = twins.opaque["one"](x), twins.plain("one", x)
    assert torch.equal(*outs)
    for ours, theirs in zip(*(twins.gradients(out, x) for out in outs), strict=True):
        assert torch.equal(ours, theirs)


def test_two_layers_are_one_graph() -> None:
    twins, x, counter = Twins(), torch.randn(3, 5, 6), CompileCounter()
    torch._dynamo.reset()
    for name in NAMES:
        found = torch.compile(twins.opaque[name].forward, backend=counter)(x)
        assert torch.equal(found, twins.plain(name, x))
    assert counter.frame_count == 1
