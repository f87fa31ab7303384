"""The adapters of a diffusers network, put there by its own `add_adapter` as peft's.

A switch sets two attributes per layer and copies nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dgpo_core.common.errors import UserError
from dgpo_core.common.seeds import derive_seed, noise
from dgpo_core.policy.adapters import NAMES, Adapters, check_settings
from dgpo_core.policy.base import AdapterName
from dgpo_core.policy.branch import lora_branch
from dgpo_core.policy.dropout import LayerDropout


class PeftAdapters(Adapters):
    """Adds the three adapters to `model` (a diffusers network), freezes everything else and switches between them.

    rank >= 1; alpha > 0: the branch is scaled by alpha / rank; dropout 0..1, on "current" alone; targets: the ends of
    module names (`to_q`, `to_out.0`). A is normal with deviation 1 / rank and B zero (peft's "gaussian"), drawn from
    `seed` per module and on the CPU: the start is the same on every device. The parameters are float32 on any base.

    Raises UserError where no module matches the targets or a number is out of range.
    """

    def __init__(
        self, model: nn.Module, *, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int
    ) -> None:
        from peft.tuners.lora import LoraLayer  # imported late, here and below: it takes seconds

        check_settings(rank, alpha, dropout, targets)
        model.requires_grad_(False)
        first, *others = NAMES
        _add(model, first, rank, alpha, targets)
        self._layers = {key: m for key, m in model.named_modules() if isinstance(m, LoraLayer)}
        for name in others:
            _add_another(model, self._layers.values(), first, name)
        for layer in self._layers.values():
            _make_lean(layer)
        states = {name: self._collect(name) for name in NAMES}
        super().__init__(states, rank=rank, alpha=alpha, dropout=dropout)
        if dropout:
            for key, layer in self._layers.items():
                layer.lora_dropout["current"] = LayerDropout(self.dropout, key)
        self._switches = [vars(m) for m in self._layers.values()]
        self._reset(seed)
        self._activate("current")

    def _activate(self, name: AdapterName | None) -> None:
        # peft's own set_adapter / enable_adapters also flip requires_grad of every parameter ("current" would lose its
        # gradients while another adapter is on), and nn.Module.__setattr__ costs more than the switch: write the two
        # attributes that peft's forward reads.
        for attributes in self._switches:
            attributes["_disable_adapters"] = name is None
            if name is not None:
                attributes["_active_adapter"] = [name]
        super()._activate(name)

    def _collect(self, name: AdapterName) -> dict[str, Parameter]:
        """The adapter's parameters as float32 leaves; only those of "current" require a gradient."""
        state: dict[str, Parameter] = {}
        for key, layer in self._layers.items():
            device = layer.get_base_layer().weight.device
            for part in ("lora_A", "lora_B"):
                linear = getattr(layer, part)[name].to(device, torch.float32)
                linear.requires_grad_(name == "current")
                state[f"{key}.{part}.weight"] = linear.weight
        return state

    def _reset(self, seed: int) -> None:
        with torch.no_grad():
            for key, first in self._states["current"].items():
                if first.is_meta:  # without storage there is no start to be drawn
                    continue
                value = torch.zeros(first.shape)
                if key.endswith("lora_A.weight"):
                    value = noise(derive_seed(seed, "lora", key), tuple(first.shape)) / self.rank
                for name in NAMES:
                    self._states[name][key].copy_(value)


@cache
def _lean_linear() -> type:
    """peft's Linear with the branch of this package; peft's own computes in the adapter's type, with more kernels."""
    from peft.tuners.lora import Linear

    class LeanLinear(Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = self.base_layer(x, *args, **kwargs)
            if self._disable_adapters:
                return y
            name = self._active_adapter[0]
            x = self.lora_dropout[name](x.to(y.dtype))
            return lora_branch(x, y, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])

    return LeanLinear


def _make_lean(layer: Any) -> None:
    from peft.tuners.lora import Linear

    if type(layer) is Linear:
        layer.__class__ = _lean_linear()


def _add(model: Any, name: str, rank: int, alpha: float, targets: Sequence[str]) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
    # peft draws on the CPU: gigabytes, which without storage would be for nothing
    without = torch.device("meta") if next(model.parameters()).is_meta else nullcontext()
    try:
        # peft draws an init that is replaced, and warns of a second adapter: the caller's RNG and ears are left alone
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), without:
            warnings.simplefilter("ignore", UserWarning)
            model.add_adapter(config, adapter_name=name)
    except ValueError as error:  # peft: "Target modules ... not found in the base model"
        raise UserError(f"No layer of the model can carry a LoRA on the targets {', '.join(targets)}.") from error


def _add_another(model: Any, layers: Iterable[nn.Module], first: str, name: str) -> None:
    """One adapter more, as the first. peft's own way compares every module with every layer that has an adapter, which
    takes seconds; here is copied what a layer keeps for each adapter by its name."""
    model.peft_config[name] = copy.copy(model.peft_config[first])
    for layer in layers:
        for kept in (*vars(layer).values(), *layer.children()):
            if isinstance(kept, dict | nn.ModuleDict | nn.ParameterDict) and first in kept:
                kept[name] = copy.deepcopy(kept[first])
