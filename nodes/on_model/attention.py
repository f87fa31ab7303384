"""The attention that a MODEL is trained through: torch's, whatever ComfyUI would take."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ldm.modules.attention
import comfy.ops
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from dgpo_core.common.errors import UserError
from dgpo_core.policy.attention import trainable_attention

OVERRIDE = "optimized_attention_override"
"""Where a model's options have it."""


def attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """torch's attention: sage and flash have no backward, and roll-outs must see the model that is trained."""
    if torch.compiler.is_compiling():  # whoever calls the compiled graph has chosen the kernels
        return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
    with trainable_kernels():
        return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def watch(model: Any) -> None:
    """Has the attention that a node has put on a clone of a MODEL watched: one without a backward is told, not trained
    through without a word, as if nothing depended on what is attended to."""
    options = model.model_options["transformer_options"]
    if OVERRIDE in options:
        options[OVERRIDE] = _watched(options[OVERRIDE])


def _watched(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Raises UserError where it is asked with a gradient and answers without one."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        found = theirs(*args, **kwargs)
        asked = torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in args)
        if asked and not found.requires_grad:
            raise UserError(
                "A node has put an attention on the MODEL that cannot be trained through (sage and flash attention have"
                " no gradient): take that node away from the MODEL of the policy."
            )
        return found

    return functools.update_wrapper(run, theirs)


@contextmanager
def trainable_kernels() -> Iterator[None]:
    """Inside, torch's attention takes none that cannot be trained through (`trainable_attention`)."""
    with trainable_attention(), _without_cudnn():
        yield


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """ComfyUI asks for kernels in an order of its own, which sets aside what `trainable_attention` has switched off."""
    order = getattr(comfy.ops, "SDPA_BACKEND_PRIORITY", None)
    if order is None:
        yield
        return
    comfy.ops.SDPA_BACKEND_PRIORITY = [kernel for kernel in order if kernel != SDPBackend.CUDNN_ATTENTION]
    try:
        yield
    finally:
        comfy.ops.SDPA_BACKEND_PRIORITY = order
