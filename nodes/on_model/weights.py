"""A layer's weight, in whatever way ComfyUI keeps it: as it is, cast where it is used, patched there, or quantised.

Linears of older ComfyUIs are all `nn.Linear`; newer ones have quantised Linears that are not, and weights that are
`QuantizedTensor`s or lie in pages of memory that ComfyUI takes back as soon as a layer has run. Layers of the pack
ComfyUI-GGUF keep a file's bytes and make their weight whole by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.ops
import torch
from torch import Tensor, nn

from dgpo_core.common.errors import UserError

from .packed_linear import ComfyPacked

_QUANTISED = getattr(comfy.ops, "QuantizedTensor", ())  # the class, of newer ComfyUIs
_PAGES = hasattr(comfy.ops, "uncast_bias_weight")  # newer ones want to hear when a weight has been used


def is_linear(module: nn.Module) -> bool:
    """A Linear of torch's or of ComfyUI's, also a quantised one."""
    return isinstance(module, nn.Linear) or (_is_cast(module) and type(module).__name__ == "Linear")


def is_quantised(tensor: Tensor) -> bool:
    """Whether this is a weight of a newer ComfyUI's quantised kinds (scaled fp8, int8, nvfp4, ...)."""
    return isinstance(tensor, _QUANTISED)


def is_gguf(module: nn.Module) -> bool:
    """A layer of ComfyUI-GGUF's whose weight is packed; those of its float16 and float32 weights are as any other."""
    asked = getattr(module, "is_ggml_quantized", None)
    return asked is not None and bool(asked())


def refuse_unknown(name: str, module: nn.Module) -> None:
    """Raises UserError for a layer whose weight is kept in a way that `lent` cannot read."""
    weight = module._parameters.get("weight")
    if weight is None or not (is_linear(module) or _is_cast(module)):
        return
    known = is_quantised(weight) or is_gguf(module)
    strange = not known and not weight.is_floating_point()  # bitsandbytes keeps bytes
    bank = is_quantised(weight) and not (is_linear(module) or isinstance(module, nn.Embedding))
    if strange or bank:
        raise UserError(
            f"The MODEL's weights are quantised in a way that cannot be trained on ({name}, {type(weight).__name__} of "
            f"{weight.dtype}): load the model in bf16, fp16, fp8 or scaled fp8, or a GGUF file with ComfyUI-GGUF."
        )


@contextmanager
def lent(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """The weight as the forward used it: cast, moved, dequantised and with the user's patches; not to be kept."""
    if isinstance(module, ComfyPacked):
        yield module.at(device, dtype)
        return
    if not _is_cast(module):  # one of torch's own
        yield module.weight.to(device, dtype)
        return
    with _lent(module, dtype, device) as (weight, _):
        yield _scaled(module, weight.dequantize().to(dtype) if is_quantised(weight) else _plain(weight))


@contextmanager
def told_of_others_weights() -> Iterator[None]:
    """Inside, the weights of a network that a node has put beside the MODEL's are told, where a gradient must pass."""
    try:
        yield
    except RuntimeError as error:
        if "Inference tensors cannot be saved" not in str(error):
            raise
        raise UserError(
            "A node has put a network of its own on the MODEL or its CONDITIONING that cannot be trained through (such"
            " as GLIGEN, or a ControlNet that is a model patch): take it away. Those of Apply ControlNet can stay."
        ) from None


def is_paged(module: nn.Module) -> bool:
    """Whether weight and bias lie in a page (`_v`) of which ComfyUI's dynamic VRAM disposes between two uses."""
    return "_v" in vars(module)


def own_parameters(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """By name, what autograd may save in place of a module's parameters: normal tensors on the device, no gradient.

    Quantised ones are left out, and those that are so already.
    """
    if is_gguf(module):
        return {}
    parameters = {name: p for name, p in module._parameters.items() if p is not None and not is_quantised(p)}
    if is_paged(module) and "weight" in parameters:  # with what a page has of the user's patches
        with _lent(module, parameters["weight"].dtype, device) as lent_ones:
            found = zip(("weight", "bias"), lent_ones, strict=True)
            return {name: part.clone() for name, part in found if part is not None}
    elsewhere = {n for n, p in parameters.items() if p.is_inference() or p.device != device or _plain(p) is not p}
    copies = {name: _plain(parameters[name]).to(device, copy=True) for name in elsewhere}
    return {**{name: p.detach() for name, p in parameters.items() if p.requires_grad}, **copies}


@contextmanager
def _lent(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight and bias of a layer of ComfyUI's."""
    if is_gguf(module):
        yield module.cast_bias_weight(dtype=dtype, device=device, bias_dtype=dtype)
        return
    options = {"offloadable": True} if _PAGES else {}
    given = comfy.ops.cast_bias_weight(module, dtype=dtype, device=device, bias_dtype=dtype, **options)
    try:
        yield given[:2]
    finally:
        if _PAGES:
            comfy.ops.uncast_bias_weight(module, *given)


def _plain(tensor: Tensor) -> Tensor:
    """Without the class that ComfyUI-GGUF gives all of a file's tensors, which makes no copies, and whose layers cut
    answers of this class off from autograd."""
    return tensor.as_subclass(Tensor) if hasattr(tensor, "tensor_type") else tensor


def _is_cast(module: nn.Module) -> bool:
    return hasattr(module, "comfy_cast_weights")


def _scaled(module: nn.Module, weight: Tensor) -> Tensor:
    """With the factors that forwards put on weight or input: older ComfyUIs' scaled fp8, and smoothed quantisation."""
    for name in ("scale_weight", "pre_quant_scale"):
        factor = getattr(module, name, None)
        if factor is not None:
            weight = weight * factor.to(weight.device, weight.dtype)
    return weight
