"""A GGUF file: a network whose weights stay packed as the file has them, whole only while in use.

The package gguf reads the file, diffusers gives the tensors their places and has torch's operations that make them
whole. Its own layer for them is not trained through: autograd would keep every whole weight for the backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgpo_core.common.errors import UserError
from dgpo_core.common.packages import is_installed, missing
from dgpo_core.common.reading import shown
from dgpo_core.policy.loading.header import Entry, Header
from dgpo_core.policy.loading.libraries import user_errors
from dgpo_core.policy.quantised import QuantisedLinear

SUFFIX = ".gguf"
_PLAIN = ("F32", "F16", "BF16")
_SHAPE = "comfy.gguf.orig_shape."  # of a tensor that was reshaped, to be packed in whole blocks


class GgufLinear(QuantisedLinear):
    """A frozen Linear with the bytes of a GGUF file. weight: diffusers' GGUFParameter; dtype: of the base."""

    def __init__(self, weight: Any, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(weight.quant_shape, dtype, bias)
        self.quant_type = weight.quant_type
        self.register_buffer("packed", weight.as_tensor())

    def made(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        from diffusers.quantizers.gguf.utils import GGUFParameter

        return _whole(GGUFParameter(parts["packed"], quant_type=self.quant_type), dtype)


def read_gguf_header(path: Path) -> Header:
    """Names, kinds and shapes of a GGUF file's tensors. Raises UserError without the package, and for a broken file."""
    tensors = {tensor.name: Entry(tensor.tensor_type.name, shape) for tensor, shape in _tensors(path)}
    return Header(path, {}, tensors)


def read_gguf_weights(header: Header, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors by name: matrices packed as they are, as diffusers' GGUFParameter, and all others as `dtype`.

    Raises UserError for a kind that diffusers cannot make whole.
    """
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter

    state: dict[str, Tensor] = {}
    for tensor, shape in _tensors(header.path):
        kind, numbers = tensor.tensor_type, torch.from_numpy(tensor.data.copy())
        if kind.name not in _PLAIN and kind not in SUPPORTED_GGUF_QUANT_TYPES:
            raise UserError(
                f"The model {shown(header.path)} has weights of the kind {kind.name}, which is not read here; known:"
                f" {', '.join(known.name for known in SUPPORTED_GGUF_QUANT_TYPES)}."
            )
        if kind.name in ("F32", "F16"):
            state[tensor.name] = numbers.reshape(shape).to(dtype)
            continue
        packed = GGUFParameter(numbers, quant_type=kind)
        kept = kind.name not in _PLAIN and len(shape) == 2 and tuple(packed.quant_shape) == shape
        state[tensor.name] = packed if kept else _whole(packed, dtype).reshape(shape)
    return state


def is_packed(state: Mapping[str, Tensor]) -> bool:
    """Whether any of the tensors is as a GGUF file has it."""
    return any(hasattr(tensor, "quant_type") for tensor in state.values())


def options(dtype: torch.dtype) -> dict[str, Any]:
    """For diffusers' `from_single_file` of a network whose state `read_gguf_weights` gave."""
    from diffusers import GGUFQuantizationConfig

    return {"quantization_config": GGUFQuantizationConfig(compute_dtype=dtype)}


def adopt(network: nn.Module, dtype: torch.dtype) -> None:
    """Puts layers of this package in the place of those that diffusers has made; what is no Linear becomes whole."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    for name, module in list(network.named_modules()):
        if isinstance(module, GGUFLinear):
            within, _, last = name.rpartition(".")
            setattr(network.get_submodule(within), last, GgufLinear(module.weight, module.bias, dtype))
            continue
        for key, parameter in module._parameters.items():
            if isinstance(parameter, GGUFParameter):
                module._parameters[key] = nn.Parameter(_whole(parameter, dtype), requires_grad=False)


def _whole(packed: Any, dtype: torch.dtype) -> Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    whole: Tensor = dequantize_gguf_tensor(packed).to(dtype)
    return whole


def _tensors(path: Path) -> list[tuple[Any, tuple[int, ...]]]:
    """The tensors of a file, mapped and not read, each with the shape that it has in the network."""
    if not is_installed("gguf"):
        what = f"The model {shown(path)} is a GGUF file, which"
        raise missing(what, "gguf", "'gguf>=0.10'", "take the same model as .safetensors")
    with user_errors(f"The model {shown(path)} is a GGUF file that cannot be read"):
        from gguf import GGUFReader

        reader = GGUFReader(path)
        found = []
        for tensor in reader.tensors:
            before = reader.get_field(_SHAPE + tensor.name)
            shape = [before.parts[i][0] for i in before.data] if before else reversed(tensor.shape.tolist())
            found.append((tensor, tuple(int(length) for length in shape)))
        return found
