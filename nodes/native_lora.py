"""LoRAs between files, the adapters of a native policy and a MODEL: read back under native names, and applied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
import torch
from torch import Tensor

from dgpo_core.errors import UserError
from dgpo_core.policy import lora_file, lora_keys

from . import lora_model

_PREFIX, _SUFFIX = "diffusion_model.", ".weight"

Part = tuple[lora_keys.Target, Tensor, Tensor]  # A [r, in] and B [out, r] of a weight, or of a part of it


def read(path: str | Path, model: Any) -> lora_file.LoraFile:
    """The LoRA in a file of any trainer that ComfyUI knows, by the names of this MODEL's own modules.

    Separate q, k and v of a layer that the MODEL has fused become one, of the sum of their ranks. Raises UserError for
    a file that is missing or damaged, and where anything of it has no place in the MODEL's network.
    """
    lora = lora_model.read(path)
    state = comfy.lora_convert.convert_lora(dict(lora))
    modules = lora_keys.modules(state)
    found = lora_keys.match(state, comfy.lora.model_lora_keys_unet(model.model, {}), {})
    _require_all(path, found)
    parts: dict[str, list[Part]] = {}
    for module, target in found.targets.items():
        pair = lora_keys.low_rank(modules[module])
        if pair is None or not _is_place(target):
            raise UserError(f"The LoRA {path} is of a kind that cannot be continued ({module}): give a plain one.")
        key = target if isinstance(target, str) else target[0]
        parts.setdefault(key.removeprefix(_PREFIX).removesuffix(_SUFFIX), []).append((target, *pair))
    shapes = {name: weight.shape for name, weight in model.model.diffusion_model.named_parameters()}
    weights = {name: _joined(shapes[name + _SUFFIX], of_it) for name, of_it in parts.items()}
    return lora_file.LoraFile(Path(path), _PREFIX.removesuffix("."), weights, lora.metadata)


def apply(model: Any, lora: Mapping[str, Tensor]) -> Any:
    """A clone of the MODEL with what `Policy.lora_tensors` gave, as ComfyUI's own loader applies it."""
    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0)[0]


def _require_all(path: str | Path, found: lora_keys.Matches) -> None:
    if lora_keys.of_text_encoder(found.missing):
        raise UserError(f"The LoRA {path} also changes the text encoder, which is not trained: give one without it.")
    if not found.targets:
        raise UserError(f"The LoRA {path} is for another model: no layer of this one has the names in it.")
    if found.missing:
        raise UserError(f"The LoRA {path} changes {found.missing[0]}, which this model lacks: give one of this model.")


def _is_place(target: lora_keys.Target) -> bool:
    """Whether it is a weight or rows or columns of one, as it is."""
    return isinstance(target, str) or len(target) < 3 or target[2] is None


def _joined(shape: torch.Size, parts: list[Part]) -> tuple[Tensor, Tensor]:
    """A [sum of r, in] and B [out, sum of r] of a weight [out, in] from those of its parts."""
    if len(parts) == 1 and isinstance(parts[0][0], str):
        return parts[0][1:]
    pairs = [(_widened(a, 1, shape[1], target), _widened(b, 0, shape[0], target)) for target, a, b in parts]
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)


def _widened(tensor: Tensor, dim: int, size: int, target: lora_keys.Target) -> Tensor:
    """The tensor with zeros for what of dimension `dim` is not the target's."""
    place = None if isinstance(target, str) else target[1]
    if place is None or place[0] != dim:
        return tensor
    _, start, length = place
    if tensor.shape[dim] != length:
        return tensor  # a misfit, which whoever compares shapes tells of
    wide = tensor.new_zeros([size if d == dim else n for d, n in enumerate(tensor.shape)])
    wide.narrow(dim, start, length).copy_(tensor)
    return wide
