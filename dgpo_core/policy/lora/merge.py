"""A LoRA merged into the frozen weights: how Lightning, LCM and Hyper-SD LoRAs make a model draw in few steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown
from dgpo_core.policy.lora.file import LoraFile
from dgpo_core.policy.quantised import QuantisedLinear


@torch.no_grad()
def merge_(lora: LoraFile, network: nn.Module) -> None:
    """W <- W + B A of each module, computed in float32. lora: under the network's own names, see `names.resolve`.

    Raises UserError where a weight has another shape, or is kept in a packed form that nothing can be added to.
    """
    for name, (a, b) in lora.weights.items():
        module: Any = network.get_submodule(name)
        if isinstance(module, QuantisedLinear):  # which makes its weight anew at every look
            raise UserError(
                f"The LoRA {shown(lora.path)} cannot be merged into weights that are packed in their file (GGUF): take"
                " the same model as .safetensors, and set model.quantize, which packs it afterwards."
            )
        weight = module.weight
        change = (b.flatten(1).float() @ a.flatten(1).float()).to(weight.device)
        if change.numel() != weight.numel() or len(change) != len(weight):
            raise UserError(f"The LoRA {shown(lora.path)} does not fit: {name} has other shapes in the model.")
        weight.copy_(weight.float() + change.view_as(weight))
