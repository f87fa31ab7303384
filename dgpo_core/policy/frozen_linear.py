"""LoRA training on networks of another engine: frozen maps of which autograd keeps nothing, and adapters beside them.

peft is for diffusers' networks. Where a network belongs to somebody else (ComfyUI), its modules must keep their names
and its weights may be inference tensors, which autograd refuses to save, or may be moved away between the forward and
the backward. So the weight is borrowed again in the backward, and the adapters live outside of the module tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Size, Tensor
from torch.nn import Parameter

from dgpo_core.common.seeds import derive_seed, noise
from dgpo_core.policy.adapters import NAMES, Adapters, check_settings
from dgpo_core.policy.base import AdapterName
from dgpo_core.policy.branch import lora_branch

Forward = Callable[[Tensor], Tensor]
Lend = Callable[[], AbstractContextManager[Tensor]]  # a frozen weight for a moment, as the gradient's dtype and device


class _Frozen(torch.autograd.Function):
    """An affine map of x whose weight gets no gradient; `pull(g, shape of x)` is the transposed map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Forward, pull: Callable[[Tensor, Size], Tensor]) -> Tensor:
        ctx.pull, ctx.shape = pull, x.shape
        y = forward(x)
        # a product over several dimensions is a view, which nobody may write into in place; this is none, and no copy
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.pull(gradients[0], ctx.shape), None, None


def frozen_linear(x: Tensor, forward: Forward, weight: Lend) -> Tensor:
    """`forward(x)`, [..., out] for x [..., in], for a frozen Linear of whatever kind.

    Neither x nor the weight is saved: the backward borrows the weight [out, in] for as long as g @ weight takes, so it
    may live in memory that is somebody else's a moment later.
    """

    def pull(g: Tensor, _: Size) -> Tensor:
        with weight() as lent:
            return g @ lent

    return _Frozen.apply(x, forward, pull)


def frozen_conv(
    x: Tensor,
    forward: Forward,
    weight: Lend,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`forward(x)` for a frozen convolution with zero padding, x [B, C, ...]; nothing is saved, as above."""

    def pull(g: Tensor, shape: Size) -> Tensor:
        like = g.new_empty(()).expand(shape)  # its shape alone is looked at
        no_output_padding = [0] * len(stride)
        options = stride, padding, dilation, False, no_output_padding, groups, (True, False, False)
        with weight() as lent:
            return torch.ops.aten.convolution_backward(g, like, lent, None, *options)[0]

    return _Frozen.apply(x, forward, pull)


class LoraBank(Adapters):
    """The adapters "current", "old" and "ema" of a network that knows nothing of them.

    shapes: (out, in) of each target by its module's name. rank >= 1; alpha > 0: the branch is scaled by alpha / rank.
    dropout 0..1: share of x that the branch of "current" does not see while it trains.
    A is normal with deviation 1 / rank and B zero, drawn from `seed` per module and on the CPU: what `PeftAdapters`
    begin with under the same names. The parameters are float32 on `device`. Raises UserError for numbers out of range
    and where there are no targets.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        seed: int,
        device: torch.device,
    ) -> None:
        check_settings(rank, alpha, dropout, tuple(shapes))
        states = {name: _fresh(shapes, rank, seed, name == "current", device) for name in NAMES}
        super().__init__(states, rank=rank, alpha=alpha, dropout=dropout)
        self.targets = tuple(shapes)

    def pairs(self, module: str) -> dict[AdapterName, tuple[Parameter, Parameter]]:
        """A [r, in] and B [out, r] of one target, by adapter."""
        names = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        return {name: (state[names[0]], state[names[1]]) for name, state in self._states.items()}

    def add(self, module: str, x: Tensor, y: Tensor) -> Tensor:
        """y [..., out] with the active adapter's branch on x [..., in] added, computed in the type of y."""
        if self._active is None:
            return y
        state = self._states[self._active]
        seen = x.to(y.dtype)
        if self._active == "current":
            seen = self.dropout(seen, module)
        A, B = state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"]
        return lora_branch(seen, y, A, B, self.scale)


def _fresh(
    shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, trained: bool, device: torch.device
) -> dict[str, Parameter]:
    state = {}
    for module, (outputs, inputs) in shapes.items():
        key = f"{module}.lora_A.weight"
        start = noise(derive_seed(seed, "lora", key), (rank, inputs)) / rank
        state[key] = Parameter(start.to(device), requires_grad=trained)
        state[f"{module}.lora_B.weight"] = Parameter(torch.zeros(outputs, rank, device=device), requires_grad=trained)
    return state
