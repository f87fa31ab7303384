"""Frozen Linears with a LoRA beside them that torch.compile can trace: what is theirs alone is in tensors.

A compiler that looked into a Linear of another engine's would trace how that casts, moves and patches a weight, or keep
the weight for the backward. So the product is one operation, which it takes as it is. And whatever differs between two
layers but tensors makes it compile one graph for each. So the operation is told by a number in a tensor which layer it
is, and all blocks of one kind have one graph.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dgpo_core.policy.branch import lora_branch
from dgpo_core.policy.frozen_linear import LoraBank

Lend = Callable[[torch.dtype, torch.device], AbstractContextManager[Tensor]]
"""A frozen weight [out, in] for a moment, in this type and on this device."""


class OpaqueLinear(nn.Module):
    """A frozen Linear whose `forward` takes the place of its own: what `frozen_linear` is, with the bank's branch.

    name: of the layer, which has a branch where it is one of the bank's targets. shape: (out, in). `product`, the
    layer's own forward, is to be set before it is called; what comes of it has the type of x. An operation finds the
    layer for as long as this object lives, which is to outlive the backward.
    """

    product: Callable[[Tensor], Tensor]

    def __init__(self, name: str, shape: Sequence[int], weight: Lend, bank: LoraBank) -> None:
        super().__init__()
        self.lent, self.bank, self.name = weight, bank, name
        self.outputs, self.inputs = shape
        self.pairs = bank.pairs(name) if name in bank.targets else {}
        number = next(_numbers)
        _layers[number] = self
        with torch.inference_mode(False):
            self.key = torch.tensor(number)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] for x [..., in]."""
        y: Tensor = _product(x, self.key, self.outputs)
        active = self.bank.active
        if not self.pairs or active is None:
            return y
        seen = x * _mask(x.detach(), self.key) if active == "current" and self.bank.dropout.is_on else x
        return lora_branch(seen, y, *self.pairs[active], self.bank.scale)


_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, OpaqueLinear] = weakref.WeakValueDictionary()


@torch.library.custom_op("dgpo::frozen_linear", mutates_args=())
def _product(x: Tensor, key: Tensor, outputs: int) -> Tensor:
    return _layers[int(key)].product(x).contiguous()


@_product.register_fake
def _(x: Tensor, key: Tensor, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@torch.library.custom_op("dgpo::frozen_linear_backward", mutates_args=())
def _pulled(g: Tensor, key: Tensor, inputs: int) -> Tensor:
    with _layers[int(key)].lent(g.dtype, g.device) as weight:
        return g @ weight


@_pulled.register_fake
def _(g: Tensor, key: Tensor, inputs: int) -> Tensor:
    return g.new_empty(*g.shape[:-1], inputs)


@torch.library.custom_op("dgpo::dropout_mask", mutates_args=())
def _mask(x: Tensor, key: Tensor) -> Tensor:
    layer = _layers[int(key)]
    return layer.bank.dropout.mask(x, layer.name)


@_mask.register_fake
def _(x: Tensor, key: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, key, _ = inputs
    ctx.inputs = x.shape[-1]
    ctx.save_for_backward(key)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
    (key,) = ctx.saved_tensors
    return _pulled(g, key, ctx.inputs), None, None


_product.register_autograd(_backward, setup_context=_remember)
