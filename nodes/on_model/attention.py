"""The attention that a MODEL is trained through: torch's, whatever ComfyUI would take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ldm.modules.attention
import comfy.ops
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from dgpo_core.policy.attention import trainable_attention

OVERRIDE = "optimized_attention_override"
"""Where a model's options have it."""


def attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """torch's attention: sage and flash have no backward, and roll-outs must see the model that is trained."""
    if torch.compiler.is_compiling():  # whoever calls the compiled graph has chosen the kernels
        return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
    with trainable_kernels():
        return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


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
