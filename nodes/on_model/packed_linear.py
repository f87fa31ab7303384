"""The engine's Linears of fewer bytes, as ComfyUI can move them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dgpo_core.policy.quantised import KINDS


class ComfyPacked:
    """What ComfyUI asks of a layer that it may leave in main memory: to bring its weight to what it is given."""

    comfy_cast_weights = True

    @property
    def weight(self: Any) -> Tensor:
        """Its shape and number type, for those who look; it has no numbers."""
        return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")

    def at(self: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The whole weight on a device."""
        parts = {name: part.to(device, non_blocking=True) for name, part in self.parts().items()}
        whole: Tensor = self.made(parts, dtype)
        return whole

    def forward(self: Any, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.device, x.dtype)
        return F.linear(x, self.at(x.device, x.dtype), bias)


@functools.cache
def layer_of(kind: str) -> Any:
    """The class of layers of a kind (a key of `quantised.KINDS`), made from a weight [out, in] and a bias."""
    return type(f"Comfy{KINDS[kind].__name__}", (ComfyPacked, KINDS[kind]), {})
