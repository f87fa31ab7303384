"""The LoRA branch, y + scale B A x, computed in the type of x from parameters that stay float32.

A tensor core multiplies bfloat16 many times as fast as float32, and each cast of an activation is one more kernel. So
the parameters are cast instead: under gradients once a forward, without them once for as long as they do not change. A
compiler casts them within what it makes of the branch: it would make a graph for each version of a parameter that is
kept with it, anew after each step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_CAST = "_dgpo_cast"  # attribute of a parameter: its version, and what it then was in another type


def lora_branch(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale B A x, for x [..., in], y [..., out], A [r, in], B [out, r]: shape and type of y."""
    low = F.linear(x, _in_type_of(x, A)).flatten(0, -2)
    rows = torch.addmm(y.flatten(0, -2), low, _in_type_of(x, B).t(), alpha=scale)
    return rows.view(y.shape)


def _in_type_of(x: Tensor, parameter: Tensor) -> Tensor:
    """The parameter in the type of x; its gradient, if it has one, comes back in its own."""
    if parameter.dtype == x.dtype:
        return parameter
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and parameter.requires_grad):
        return parameter.to(x.dtype)
    kept: tuple[int, Tensor] | None = getattr(parameter, _CAST, None)
    if kept is not None:
        version, cast = kept
        if version == parameter._version and cast.dtype == x.dtype and cast.device == parameter.device:
            return cast
    cast = parameter.detach().to(x.dtype)
    setattr(parameter, _CAST, (parameter._version, cast))
    return cast
