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

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown
from dgpo_core.policy.lora import file as lora_file
from dgpo_core.policy.lora import keys as lora_keys
from dgpo_core.policy.lora.report import PLAIN

from ..common import lora_model

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
    shapes = {name: weight.shape for name, weight in model.model.diffusion_model.named_parameters()}
    parts: dict[str, list[Part]] = {}
    for module, target in found.targets.items():
        pair = lora_keys.low_rank(modules[module])
        key = (target if isinstance(target, str) else target[0]).removeprefix(_PREFIX)
        # of a kernel of 1 x 1, as that of SD1.5's proj_in, the file's numbers are a Linear's
        if pair is None or pair[0].ndim > 2 or len(shapes[key]) > 2 or not _is_place(target):
            raise UserError(_not_continued(path, module, lora_keys.form(modules[module])))
        parts.setdefault(key.removesuffix(_SUFFIX), []).append((target, *pair))
    weights = {name: _joined(shapes[name + _SUFFIX], of_it) for name, of_it in parts.items()}
    return lora_file.LoraFile(Path(path), weights, lora.metadata)


def apply(model: Any, lora: Mapping[str, Tensor]) -> Any:
    """A clone of the MODEL with what `Policy.lora_tensors` gave, as ComfyUI's own loader applies it."""
    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0)[0]


def _require_all(path: str | Path, found: lora_keys.Matches) -> None:
    name = shown(path)
    if lora_keys.of_text_encoder(found.missing):
        raise UserError(f"The LoRA {name} also changes the text encoder, which is not trained: give one without it.")
    if not found.targets and not found.left_out:
        raise UserError(f"The LoRA {name} is for another model: no layer of this one has the names in it.")
    if found.missing:
        lost = shown(found.missing[0])
        raise UserError(f"The LoRA {name} changes {lost}, which this model lacks: give one of this model.")
    if found.twice:
        raise UserError(f"The LoRA {name} changes {shown(found.twice[0])} twice, under two names: give one with one.")
    if found.left_out:
        raise UserError(f"The LoRA {name} is incomplete: A and B of {shown(found.left_out[0])} do not belong together.")


def _not_continued(path: str | Path, module: str, form: str) -> str:
    where = f"The LoRA {shown(path)} cannot be continued: {shown(module)} is"
    if form == "LoRA":
        return f"{where} a convolution, which gets no adapter here: put that LoRA on the MODEL, before the policy."
    return f"{where} {f'of the form {form}' if form else 'of a form that is not known'}; {PLAIN}."


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
