"""What an image depends on, as one text that is the same after a restart: weights, patches, options, conditionings.

Weights are known by a few of their numbers, which takes milliseconds where all of them would take a minute.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from comfy.controlnet import ControlBase
from comfy.model_patcher import ModelPatcher
from torch import Tensor

_DEEPEST = 8  # of containers and objects that are looked into
_PLAIN = (str, int, float, tuple, list, dict, Tensor)
_CONTROL = (  # what a ControlNet does to an image
    *("cond_hint_original", "extra_concat_orig", "strength", "timestep_percent_range"),
    *("control_model", "t2i_model", "previous_controlnet"),
)

_UNREAD = dict.fromkeys(("SD1ClipModel", "SDXLClipModel"), "clip_l.transformer.text_projection.weight")
"""By class of text encoder, a weight that nothing depends on. Checkpoints of SD1.5 and SDXL have none, and ComfyUI
leaves in its place what was in memory, so that it differs each time that they are loaded."""

Read = Callable[[Tensor], bytes]


def samples(tensor: Tensor) -> bytes:
    """Four of its numbers; of a GGUF file's bytes, four of these; none of what is quantised in another way."""
    if hasattr(tensor, "tensor_type"):
        tensor = tensor.as_subclass(Tensor)
    if tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.numel():
        return b""
    last = tensor.numel() - 1
    return whole(tensor.detach().flatten()[[0, last // 3, 2 * last // 3, last]])


def whole(tensor: Tensor) -> bytes:
    """All of its numbers."""
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()


def nothing(tensor: Tensor) -> Tensor:
    """Zeros in the place of a tensor, in the memory of one number."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def fingerprint(*values: Any, read: Read = samples) -> str:
    """64 letters that stand for numbers, texts, tensors, models, containers of them, and the kind of anything else.

    read: what is looked at of a tensor; of a model's weights it is `samples`.
    """
    digest = hashlib.sha256()
    _add(digest, values, read, 0)
    return digest.hexdigest()


def _add(digest: Any, value: Any, read: Read, depth: int) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype};".encode())
        digest.update(read(value))
    elif isinstance(value, str | int | float | None):
        digest.update(f"{value!r};".encode())
    elif isinstance(value, ModelPatcher):
        _add(digest, _patched(value), samples, 0)
    elif isinstance(value, torch.nn.Module):  # such as another `model_sampling`
        weights = [type(value).__qualname__, *value.named_parameters(), *value.named_buffers()]
        _add(digest, weights, samples, depth)
    elif depth < _DEEPEST:
        for part in _parts(value):
            _add(digest, part, read, depth + 1)


def _patched(patcher: ModelPatcher) -> list[Any]:
    """The weights of a MODEL without patches, and its patches and options."""
    backup = patcher.backup  # of the weights that have patches in place
    named, unread = patcher.model.named_parameters(), _UNREAD.get(type(patcher.model).__name__)
    weights = [
        (key, nothing(part) if key == unread else backup[key].weight if key in backup else part) for key, part in named
    ]
    return [*weights, patcher.patches, patcher.model_options, patcher.object_patches]


def _parts(value: Any) -> list[Any]:
    """What is in a container; of an object its kind and what of it matters, where that is known."""
    if isinstance(value, dict):
        return [part for key in sorted(value, key=str) for part in (str(key), value[key])]
    if isinstance(value, list | tuple):
        return list(value)
    kind = getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, functools.partial):
        return [kind, value.func, value.args, value.keywords]
    if inspect.isfunction(value):  # a patch has its settings as defaults or from around it
        return [kind, value.__defaults__, value.__kwdefaults__, *_enclosed(value)]
    if isinstance(value, ControlBase):
        loras = getattr(value, "control_weights", {}).values()  # of a Control-LoRA, which makes its network later
        mine = [samples(part).hex() for part in loras if isinstance(part, Tensor)]
        return [kind, *(getattr(value, name, None) for name in _CONTROL), getattr(value, "extra_args", {}), *mine]
    return [kind, getattr(value, "weights", None)]  # a LoRA's tensors


def _enclosed(function: Any) -> list[Any]:
    """The plain values that a function takes from around it; objects there may change by being used."""
    found = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one
            found.append(cell.cell_contents)
    return [value for value in found if isinstance(value, _PLAIN)]
