"""A MODEL in fewer bytes: a network of its own beside ComfyUI's, whose large Linears keep their weights packed.

The MODEL's own weights stay as they are, in main memory: the graph uses them elsewhere. What trains is a second network
that shares nothing with it, and it alone is ever on the card; ComfyUI moves it as it moves any model, also in part.
The layers are the engine's (`dgpo_core.policy.quantised`), of the weights with the user's LoRAs in them.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterator
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import torch
from torch import nn

from dgpo_core.common.errors import UserError
from dgpo_core.policy.quantised import KINDS, PackedLinear, refuse_unavailable, within_blocks

from .packed_linear import layer_of
from .weights import is_gguf, is_linear, is_quantised

_NETWORK = "diffusion_model"
_KEPT_WHOLE = ("emb_layers.1",)  # of UNets: what the time does to a block, as headless
_OF_LOADING = ("dynamic_vbars", "dynamic_pins", "dynamic_patchers")  # ComfyUI's account of where bytes are


def packed(model: Any, kind: str) -> Any:
    """A MODEL with all that is on this one, whose network is a copy with its large Linears in fewer bytes.

    model: a ModelPatcher; kind: a key of `quantised.KINDS`. Layers that the graph has quantised itself stay so. Raises
    UserError where the kind cannot be had here, and where there is nothing to quantise.
    """
    refuse_unavailable(kind, model.load_device)
    with torch.inference_mode():
        _unload(model)
        layers = dict(_packed_layers(model, kind))
        if not layers:
            raise UserError(
                f"No layer of the MODEL can be quantised to {kind} (its weights may be in fewer bytes already): set"
                " quantize to none."
            )
        base = _copied(model.model, layers).to(model.offload_device)
    made = _clone(model)
    base.device = made.offload_device
    made.model, made.size, made.parent, made.clone_base_uuid = base, 0, None, uuid.uuid4()
    made.backup, made.backup_buffers, made.object_patches_backup, made.pinned = {}, {}, {}, set()
    within = {f"{_NETWORK}.{name}.weight" for name in layers}
    made.patches = {key: patches for key, patches in made.patches.items() if key not in within}
    made.patches_uuid = uuid.uuid4()
    return made


def _unload(model: Any) -> None:
    """Off the card, with no patch in its weights: for the copy, and so that there is room for it."""
    loaded = comfy.model_management.current_loaded_models
    others = [entry for entry in loaded if entry.model is None or entry.model.model is not model.model]
    comfy.model_management.free_memory(1e30, model.load_device, others)


def _clone(model: Any) -> Any:
    """A clone whose weights ComfyUI keeps as they are, not in pages (dynamic VRAM)."""
    own = type(model)
    if not getattr(model, "is_dynamic", bool)():
        return model.clone()
    model.__class__ = comfy.model_patcher.ModelPatcher
    try:
        return model.clone()
    finally:
        model.__class__ = own


def _packed_layers(model: Any, kind: str) -> Iterator[tuple[str, PackedLinear]]:
    """What takes the place of the Linears that are to be packed, by name."""
    numbers = model.get_key_patches(f"{_NETWORK}.")
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    for name, module in _large_linears(model.model.diffusion_model):
        key = f"{_NETWORK}.{name}.weight"
        (weight, convert), *patches = numbers[key]
        whole = convert(weight.to(model.load_device, torch.float32, copy=True), inplace=True)
        if patches:
            whole = comfy.lora.calculate_weight(patches, whole, key)
        if not KINDS[kind].fits(whole):
            continue
        bias = None if module.bias is None else nn.Parameter(module.bias.clone(), requires_grad=False)
        layer = layer_of(kind)(whole.to(dtype), bias).to(model.offload_device)
        yield name, layer.train(module.training)


def _large_linears(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those within lists of blocks whose weights are in more than a byte each."""
    for name, module in within_blocks(network, _KEPT_WHOLE):
        if not is_linear(module) or is_gguf(module):
            continue
        weight = module._parameters.get("weight")
        if weight is not None and not is_quantised(weight) and weight.is_floating_point() and weight.element_size() > 1:
            yield name, module


def _copied(base: Any, layers: dict[str, PackedLinear]) -> Any:
    """A copy of a MODEL's BaseModel with these layers of its network in the place of its own, which are not copied."""
    known: dict[int, Any] = {id(base.diffusion_model.get_submodule(name)): layer for name, layer in layers.items()}
    for shared in ("model_config", "latent_format"):
        known[id(getattr(base, shared))] = getattr(base, shared)
    for gone in ("current_patcher", *_OF_LOADING):
        value = getattr(base, gone, None)
        if value is not None:
            known[id(value)] = type(value)() if gone in _OF_LOADING else None
    made = copy.deepcopy(base, known)
    made.model_loaded_weight_memory = made.lowvram_patch_counter = 0
    made.model_lowvram, made.current_weight_patches_uuid = False, None
    return made
