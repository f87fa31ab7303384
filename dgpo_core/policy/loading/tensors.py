"""The numbers of a model: scaled fp8 made whole, and what is missing or no number told before anything is drawn.

Scaled fp8 keeps a layer's weight as fp8 and a scale beside it; the weight is their product. ComfyUI writes the scale as
`scale_weight` (with a tensor `scaled_fp8` that says so) or, newer, as `weight_scale` (with the format in `comfy_quant`
or in the header). Diffusers reads neither: the weights would be taken without their scales, and no error be raised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import parse_json, shown
from dgpo_core.policy.loading.header import Header
from dgpo_core.policy.quantised import QuantisedLinear

_SCALES = ("scale_weight", "weight_scale")
_ASIDE = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")  # say nothing of a weight's numbers
_FP8 = ("F8_E4M3", "F8_E5M2")
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_PLAIN = ("F64", "F32", "F16", "BF16", *_FP8)
FULLER = "take the same model in bf16, fp16 or fp8"


def read_weights(header: Header, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name: fp8 ones as `dtype`, multiplied by their scales, others as they are.

    Raises UserError for a kind of quantisation that is not known.
    """
    refuse_unknown(header)
    state = load_file(header.path)
    for name, tensor in state.items():
        if name.endswith(".comfy_quant"):
            _check_format(header, _json(bytes(tensor.flatten().tolist()), header))
    scales = {name.rpartition(".")[0]: tensor for name, tensor in state.items() if _last(name) in _SCALES}
    return {
        name: _whole(header, name, tensor, scales, dtype)
        for name, tensor in state.items()
        if _last(name) not in (*_SCALES, *_ASIDE)
    }


def refuse_unknown(header: Header) -> None:
    """Raises UserError where weights are kept in a way that `read_weights` does not know; reads the header alone."""
    if "_quantization_metadata" in header.metadata:
        described = _json(header.metadata["_quantization_metadata"], header)
        layers = described.get("layers") if isinstance(described, dict) else None
        for layer in layers.values() if isinstance(layers, dict) else ():
            _check_format(header, layer)
    fp8 = {name.rpartition(".")[0] for name, entry in header.tensors.items() if entry.dtype in _FP8}
    for name, entry in header.tensors.items():
        module, _, last = name.rpartition(".")
        if last == "weight" and len(entry.shape) > 1 and entry.dtype not in _PLAIN:
            raise _quantised(header, f"{shown(name, 100)} is of type {entry.dtype}")
        if "scale" in last and module in fp8 and last not in (*_SCALES, *_ASIDE):
            raise _quantised(header, f"it has {shown(name, 100)}")
        if last in _SCALES and f"{module}.weight" not in header.tensors:
            raise _quantised(header, f"{shown(name, 100)} has no weight beside it")


def has_scales(header: Header) -> bool:
    """Whether its weights are to be multiplied by scales that lie beside them."""
    return any(_last(name) in (*_SCALES, "scaled_fp8") for name in header.tensors)


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in `dtype`, but for what a class of diffusers' keeps in float32 when it is loaded (one of
    transformers' keeps such parts so in float16 alone)."""
    from diffusers import ModelMixin  # imported late: it takes seconds

    kept = set(module._keep_in_fp32_modules or ()) if isinstance(module, ModelMixin) else set()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept.intersection(name.split(".")) else dtype)
    return module


def refuse_missing(module: nn.Module, name: str, what: str) -> None:
    """Raises UserError for a component that was made without weights for a part of it.

    name: of the component in the pipeline; what: begins the sentence, "The model x".
    """
    key = next((key for key, tensor in _tensors(module) if tensor.is_meta), None)
    if key is not None:
        raise UserError(f"{what} has no weights for {name}.{key}: give a whole one (with configs of the same model).")


def refuse_not_finite(module: nn.Module, name: str, what: str, dtype: torch.dtype) -> None:
    """Raises UserError for a component with weights that are no finite numbers; the arguments are as above."""
    key = next((key for key, tensor in _tensors(module) if not _finite(tensor)), None)
    if key is not None:
        narrow = " in float16 (try model.dtype bfloat16)" if dtype == torch.float16 else ""
        raise UserError(f"{what} has weights that are not finite numbers{narrow} in {name}.{key}: take a sound one.")


def refuse_left_over(network: nn.Module, header: Header, prefixes: tuple[str, ...], what: str) -> None:
    """Raises UserError where the file holds more of the network than was put into it: the configs are of another."""
    parts = [name for name in header.tensors if name.startswith(prefixes)] or list(header.tensors)
    weights = [name for name in parts if _last(name) not in (*_SCALES, *_ASIDE)]
    there, used = sum(header.tensors[name].numel for name in weights), sum(t.numel() for _, t in _tensors(network))
    packed = [module for module in network.modules() if isinstance(module, QuantisedLinear)]
    used += sum(m.in_features * m.out_features - sum(b.numel() for b in m.buffers()) for m in packed)
    if any(name.startswith(prefixes) for name in header.tensors) and there > used:
        raise UserError(
            f"{what} has {there:,} numbers in its network where its configs have room for {used:,}: they are of another"
            " model, so give the config folder of this one."
        )


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return module.state_dict(keep_vars=True).items()


def _finite(tensor: Tensor) -> bool:
    """Whether all are finite; the sum, which is quick, tells where it is finite itself."""
    if not tensor.is_floating_point():
        return True
    return bool(tensor.detach().sum(dtype=torch.float32).isfinite()) or bool(tensor.detach().isfinite().all())


def _whole(header: Header, name: str, tensor: Tensor, scales: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    module, _, last = name.rpartition(".")
    if last == "weight" and module in scales:
        return (tensor.float() * _spread(header, name, scales[module].float(), tensor)).to(dtype)
    return tensor.to(dtype) if header.tensors[name].dtype in _FP8 else tensor


def _spread(header: Header, name: str, scale: Tensor, weight: Tensor) -> Tensor:
    """The scale ready to multiply the weight [out, ...]: one number, or one for each of its rows."""
    if scale.numel() == 1:
        return scale.reshape(())
    if weight.ndim and scale.numel() == scale.shape[0] == weight.shape[0]:
        return scale.reshape(-1, *[1] * (weight.ndim - 1))
    raise _quantised(header, f"{shown(name, 100)} has scales of shape {list(scale.shape)}")


def _check_format(header: Header, layer: Any) -> None:
    name = layer.get("format") if isinstance(layer, dict) else None
    if name not in _FORMATS:
        raise _quantised(header, f"a layer is of format {shown(name, 40)}")


def _json(text: str | bytes, header: Header) -> Any:
    return parse_json(text, f"The quantisation of the model {shown(header.path)}")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _quantised(header: Header, how: str) -> UserError:
    return UserError(f"The model {shown(header.path)} is quantised in a way that is not read here ({how}): {FULLER}.")
