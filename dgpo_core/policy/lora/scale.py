"""The scale of a LoRA where its weights do not say it: alpha of diffusers and peft, which keep it beside the weights.

Kohya's files have one `.alpha` per module. diffusers writes peft's settings into the header, one JSON text under
`lora_adapter_metadata`; peft itself writes them into `adapter_config.json` beside the file. Here all become `.alpha`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgpo_core.common import reading
from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown
from dgpo_core.policy.lora import keys as lora_keys

_HEADER = "lora_adapter_metadata"
_BESIDE = "adapter_config.json"
_PEFT = "base_model.model."
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Starts of a LoRA that peft takes off the base model's weights, so that the file says nothing without them."""


@dataclass(frozen=True)
class Scaling:
    """peft's rule for alpha / rank. patterns: alpha by the end of a module's name; rslora: divide by sqrt(rank)."""

    alpha: float
    patterns: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def of(self, module: str, rank: int) -> float:
        """What B A of a module of this rank is multiplied by. The first pattern that fits decides."""
        fits = (a for name, a in self.patterns.items() if module == name or module.endswith(f".{name}"))
        alpha = next(fits, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def with_alphas(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a file, with a `.alpha` for each module whose scale stands elsewhere.

    A module's own `.alpha` counts before all else. Raises UserError where the settings are not readable.
    """
    scalings = _scalings(path, state, metadata)
    whole = dict(state)
    for module, parts in lora_keys.modules(state).items() if scalings else ():
        prefix = next((p for p in scalings if module.startswith(p)), None)
        down = next((t for key, t in parts.items() if lora_keys.is_first(key)), None)
        if prefix is not None and down is not None and down.ndim and not any(map(lora_keys.is_alpha, parts)):
            rank = down.shape[0]
            scale = scalings[prefix].of(module.removeprefix(prefix), rank)
            whole[f"{module}.alpha"] = torch.tensor(scale * rank, dtype=torch.float64)
    return whole


def _scalings(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Scaling]:
    """The rule of each part of the file, by the start of its modules' names."""
    if _HEADER in metadata:
        where = f"The entry {_HEADER} in the header of the LoRA {shown(path)}"
        groups: dict[str, dict[str, Any]] = {}
        for key, value in _object(reading.parse_json(metadata[_HEADER], where), where).items():
            network, dot, name = key.partition(".")
            groups.setdefault(f"{network}." if dot else "", {})[name if dot else network] = value
        scalings = {prefix: _scaling(values, where) for prefix, values in groups.items()}
        return {prefix: scaling for prefix, scaling in scalings.items() if scaling}
    beside = path.with_name(_BESIDE)
    if any(key.startswith(_PEFT) for key in state) and beside.is_file():
        where = "The LoRA's settings"
        scaling = _scaling(_object(reading.read_json(beside, where), f"{where} {shown(beside)}"), where)
        return {_PEFT: scaling} if scaling else {}
    return {}


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object of settings, not {shown(value, 40)}.")
    return value


def _scaling(values: Mapping[str, Any], where: str) -> Scaling | None:
    """The rule in peft's LoraConfig as plain data; None where it names no alpha."""
    init = values.get("init_lora_weights")
    if values.get("use_dora") or values.get("use_qalora"):
        raise UserError(f"{where} says that it is a DoRA or QA-LoRA, which is not read: give a plain LoRA.")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise UserError(
            f"{where} says that it starts from {shown(init, 40)}, which changes the base model too: convert it with"
            " peft's path_initial_model_for_weight_conversion."
        )
    if values.get("lora_alpha") is None:
        return None
    patterns = _object(values.get("alpha_pattern") or {}, f"{where}: alpha_pattern")
    return Scaling(
        _number(values["lora_alpha"], f"{where}: lora_alpha"),
        {_name(name, where): _number(alpha, f"{where}: alpha_pattern") for name, alpha in patterns.items()},
        bool(values.get("use_rslora")),
    )


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where} must be a number, not {shown(value, 40)}.")
    return float(value)


def _name(name: str, where: str) -> str:
    """A pattern that is a name. peft takes any regular expression, and one from a file could run for ever."""
    plain = name.removeprefix("^")
    if not re.fullmatch(r"[\w.-]+", plain):
        raise UserError(f"{where}: alpha_pattern has {shown(name, 40)}, which is no name of modules.")
    return plain
