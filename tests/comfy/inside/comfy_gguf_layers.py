"""Layers that keep the bytes of a GGUF file, as the pack ComfyUI-GGUF has them.

With COMFYUI_GGUF, the folder of that pack, they are its own; else they are made here to behave alike where it matters
to who trains: a class of tensors whose shape is not that of their bytes, which knows no copies, which comes through any
operation, and which layers strip from their answers in a way that autograd does not see.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.utils
import gguf
import torch
from torch import Tensor, nn

PLAIN = (None, gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)


class _Tensor(torch.Tensor):
    def __new__(cls, *args: Any, tensor_type: Any, tensor_shape: Any, **kwargs: Any) -> _Tensor:
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args: Any, tensor_type: Any, tensor_shape: Any, **kwargs: Any) -> None:
        super().__init__()
        self.tensor_type, self.tensor_shape, self.patches = tensor_type, tensor_shape, []

    def to(self, *args: Any, **kwargs: Any) -> _Tensor:
        new = super().to(*args, **kwargs)
        new.tensor_type = getattr(self, "tensor_type", None)
        new.tensor_shape = getattr(self, "tensor_shape", new.data.shape)
        new.patches = list(getattr(self, "patches", []))
        return new

    def clone(self, *args: Any, **kwargs: Any) -> _Tensor:
        return self

    def detach(self, *args: Any, **kwargs: Any) -> _Tensor:
        return self

    @property
    def shape(self) -> torch.Size:
        return getattr(self, "tensor_shape", self.size())


def _is_packed(tensor: Tensor | None) -> bool:
    return tensor is not None and getattr(tensor, "tensor_type", None) not in PLAIN


def _whole(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None:
        return None
    weight = tensor.to(dtype)
    if _is_packed(tensor):
        numbers = gguf.quants.dequantize(tensor.as_subclass(Tensor).cpu().numpy(), tensor.tensor_type)
        weight = torch.from_numpy(numbers).reshape(tensor.tensor_shape).to(dtype)
    weight = torch.Tensor(weight)
    for patches, key in getattr(tensor, "patches", []):
        weight = comfy.lora.calculate_weight(patches, weight, key)
    return weight


class _Layer(nn.Module):
    comfy_cast_weights = True

    def is_ggml_quantized(self) -> bool:
        return _is_packed(self.weight) or _is_packed(self.bias)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}{name}" in state:
                setattr(self, name, nn.Parameter(state[f"{prefix}{name}"], requires_grad=False))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name in ("weight", "bias"):
            if getattr(self, name) is not None:
                destination[prefix + name] = torch.zeros_like(getattr(self, name), device="meta")

    def cast_bias_weight(
        self, input: Any = None, dtype: Any = None, device: Any = None, bias_dtype: Any = None
    ) -> tuple[Tensor | None, Tensor | None]:
        dtype = dtype or input.dtype
        return _whole(self.weight, dtype), _whole(self.bias, dtype)

    def forward_comfy_cast_weights(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.is_ggml_quantized():
            out = nn.functional.linear(input, *self.cast_bias_weight(input))
        else:
            out = super().forward_comfy_cast_weights(input, *args, **kwargs)
        return torch.Tensor(out) if isinstance(out, _Tensor) else out


class _Ops(comfy.ops.manual_cast):
    class Linear(_Layer, comfy.ops.manual_cast.Linear):
        def __init__(self, in_features: int, out_features: int, *args: Any, **kwargs: Any) -> None:
            nn.Module.__init__(self)  # a Linear's own would make a weight
            self.in_features, self.out_features, self.weight, self.bias = in_features, out_features, None, None

    class LayerNorm(_Layer, comfy.ops.manual_cast.LayerNorm):
        pass


class _Patcher(comfy.model_patcher.ModelPatcher):
    def patch_weight_to_device(self, key: str, device_to: Any = None, *args: Any, **kwargs: Any) -> None:
        weight = comfy.utils.get_attr(self.model, key)
        if key not in self.patches or not _is_packed(weight):
            super().patch_weight_to_device(key, device_to, *args, **kwargs)
            return
        weight = weight.to(device_to)
        weight.patches = [(self.patches[key], key)]
        comfy.utils.set_attr_param(self.model, key, weight)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        for parameter in self.model.parameters() if unpatch_weights else ():
            if _is_packed(parameter):
                parameter.patches = []
        return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)

    def load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> Any:
        return super().load(*args, force_patch_weights=True, **kwargs)


GGMLTensor, GGMLOps, GGUFModelPatcher = _Tensor, _Ops, _Patcher
if os.environ.get("COMFYUI_GGUF"):
    sys.modules["gguf_pack"] = types.ModuleType("gguf_pack")
    sys.modules["gguf_pack"].__path__ = [os.environ["COMFYUI_GGUF"]]
    GGMLTensor, GGMLOps = (getattr(importlib.import_module("gguf_pack.ops"), n) for n in ("GGMLTensor", "GGMLOps"))
    GGUFModelPatcher = importlib.import_module("gguf_pack.nodes").GGUFModelPatcher


def packed(weight: Tensor, kind: str) -> Tensor:
    """A weight as the pack has it from a file: matrices in rows of whole blocks are of that kind, all else float32."""
    quant = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[quant]
    if weight.ndim != 2 or weight.shape[1] % block:
        quant, numbers = gguf.GGMLQuantizationType.F32, weight.clone()
    else:
        numbers = torch.from_numpy(gguf.quants.quantize(weight.numpy(), quant))
    return GGMLTensor(numbers, tensor_type=quant, tensor_shape=weight.shape)
