"""The MODELs that native policies train: found again by what they are, and held by nobody here.

A handle on an edge names its MODEL by a fingerprint of weights, patches and options, so that a run goes on after a
restart where the same files are loaded the same way. ComfyUI's own cache decides how long the MODEL is kept.
"""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import torch
from torch import Tensor

from dgpo_core.errors import UserError

_DEEPEST = 8  # of the options that are looked into

_models: dict[str, tuple[weakref.ref, ...]] = {}
_gone: list[str] = []


def remember(model: Any, clip: Any, vae: Any) -> str:
    """The name under which `find` gives these out: the family, and a fingerprint of all that an image depends on."""
    digest = hashlib.sha256()
    for patcher in (model, clip.patcher, vae.patcher):
        _add_patcher(digest, patcher)
    _add(digest, clip.layer_idx, 0)
    name = f"{type(model.model.model_config).__name__}-{digest.hexdigest()[:16]}"
    _models[name] = (weakref.ref(model, lambda _: _gone.append(name)), weakref.ref(clip), weakref.ref(vae))
    return name


def find(name: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE. Raises UserError where ComfyUI has dropped one of them."""
    found = tuple(part() for part in _models.get(name, ()))
    if not found or None in found:
        raise UserError("The MODEL, CLIP or VAE of this policy is no longer in memory: queue the workflow once more.")
    return found


def means_another(name: str, base: Any) -> bool:
    """Whether the name by now stands for a MODEL on another network than `base`: the same files, loaded again."""
    model = _models[name][0]() if name in _models else None
    return model is not None and model.model is not base


def lost() -> int:
    """How many MODELs ComfyUI has dropped: a node that named one has to run again."""
    return len(_gone)


def _add_patcher(digest: Any, patcher: Any) -> None:
    for key, parameter in patcher.model.named_parameters():
        backup = patcher.backup.get(key)  # the weight without patches, where some are in place
        _add(digest, (key, parameter if backup is None else backup.weight), 0)
    _add(digest, (patcher.patches, patcher.model_options, patcher.object_patches), 0)


def _add(digest: Any, value: Any, depth: int) -> None:
    """Numbers, texts and a few elements of tensors as they are; of anything else what it is."""
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype};".encode())
        digest.update(_samples(value))
    elif isinstance(value, dict) and depth < _DEEPEST:
        for key in sorted(value, key=str):
            _add(digest, (str(key), value[key]), depth + 1)
    elif isinstance(value, list | tuple) and depth < _DEEPEST:
        for part in value:
            _add(digest, part, depth + 1)
    elif isinstance(value, str | int | float | None):
        digest.update(f"{value!r};".encode())
    else:
        _add_object(digest, value, depth)


def _add_object(digest: Any, value: Any, depth: int) -> None:
    digest.update(f"{getattr(value, '__qualname__', type(value).__qualname__)};".encode())
    if isinstance(value, torch.nn.Module):  # such as another `model_sampling`
        _add(digest, [*value.named_parameters(), *value.named_buffers()], depth + 1)
    elif hasattr(value, "weights"):  # a LoRA's tensors
        _add(digest, value.weights, depth + 1)


def _samples(tensor: Tensor) -> bytes:
    if tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.numel():
        return b""
    last = tensor.numel() - 1
    flat = tensor.detach().flatten()[[0, last // 3, 2 * last // 3, last]]
    return flat.to("cpu", torch.float32).numpy().tobytes()
