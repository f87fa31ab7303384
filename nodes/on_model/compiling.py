"""The repeated blocks of a MODEL's network under torch.compile, each as one graph that all of its kind share.

A graph holds what a block is told besides tensors. Networks tell their blocks much that is for patches alone, such as
which block it is and at which noise level: each of these would be a graph. So a block is told none of it, and one that
has a patch runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import nn

from dgpo_core.common.errors import UserError

from .attention import OVERRIDE, attention, trainable_kernels
from .weights import is_linear

_COMFYUIS_OWN = "torch.compile"  # the key under which ComfyUI's node TorchCompileModel wraps a MODEL
_PATCHES = ("patches", "patches_replace")
_FOR_PATCHES = frozenset(
    (
        *("block", "block_index", "block_type", "total_blocks", "transformer_index", "img_slice", "grid_sizes"),
        *("original_shape", "activations_shape", "reference_image_num_tokens"),
        *("cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "callbacks", "wrappers"),
    )
)
# A kind of block has a graph for each adapter, with and without gradients, drawing and training, and for one row and
# several: past torch's limit of 8 it would run as it is without a word.
_MOST_GRAPHS = 64


def repeated(network: nn.Module) -> list[nn.Module]:
    """The members of lists of blocks of one kind: transformer blocks. Raises UserError where there are none."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and _is_of_blocks(child):
                found.extend(child)
            else:
                walk(child)

    walk(network)
    if not found:
        raise UserError("The MODEL's network has no repeated blocks that could be compiled: set memory.compile to off.")
    return found


def _is_of_blocks(members: nn.ModuleList) -> bool:
    """Not of layers; and not of what has convolutions, which `OpaqueLinear` has nothing for."""
    kinds = {type(member) for member in members}
    if len(kinds) != 1 or issubclass(*kinds, nn.ModuleList | nn.Sequential):
        return False
    parts = list(members[0].modules())
    return sum(map(is_linear, parts)) > 1 and not any(isinstance(p, nn.Conv1d | nn.Conv2d | nn.Conv3d) for p in parts)


def compiled(forward: Callable, backend: str) -> Callable:
    """A block's forward with what can be compiled of its calls compiled; by which of torch's backends."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _MOST_GRAPHS)
    fast = torch.compile(forward, backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        if any(map(_is_patched, (*args, *kwargs.values()))):
            return forward(*args, **kwargs)
        try:
            with trainable_kernels():  # which are chosen while a graph is made, and no guard looks at them
                return fast(*map(_told, args), **{name: _told(value) for name, value in kwargs.items()})
        except torch._dynamo.exc.TorchDynamoException as error:
            sentence = f"torch.compile does not work here ({_reason(error)}): set memory.compile to off."
            raise UserError(sentence) from error

    return run


def _is_patched(value: Any) -> bool:
    return isinstance(value, dict) and any(value.get(name) for name in _PATCHES)


def _told(value: Any) -> Any:
    """An argument of a block's as it is, but for a network's options."""
    if not isinstance(value, dict):
        return value
    return {OVERRIDE: attention, **{name: part for name, part in value.items() if name not in _FOR_PATCHES}}


def _reason(error: Exception) -> str:
    """The line of what torch says that is a reason: the first announces it."""
    lines = [line for line in str(error).splitlines() if line and not line.endswith(":")]
    return lines[0] if lines else type(error).__name__


def without_comfyuis(model: Any) -> None:
    """Takes off a clone of a MODEL what compiles its network as a whole, as ComfyUI's node TorchCompileModel does.

    It would trace the adapters of one step into its graph. Raises UserError for what other nodes have put in the
    network's place.
    """
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, _COMFYUIS_OWN)
    parts = [*model.object_patches.values(), *model.model.modules()]
    if any(type(part).__name__ == "OptimizedModule" for part in parts):  # looking for the class itself takes seconds
        raise UserError(
            "A node has put compiled parts in the place of the MODEL's own, which cannot be trained: take that node"
            " away, and set memory.compile to on."
        )
