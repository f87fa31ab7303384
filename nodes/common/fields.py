"""Inputs of nodes, from the engine's forms and settings: one source for each name, default, range and line of help."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from comfy_api.v0_0_2 import io

from dgpo_core.comfy import forms
from dgpo_core.common.errors import UserError
from dgpo_core.settings.config import Config, Range
from dgpo_core.settings.schema import field_docs
from dgpo_core.settings.values import read_settings

FINE, COARSE = 1e-6, 0.01  # steps of float widgets
SEEDS = 2**32 - 1

Policy = io.Custom(forms.POLICY)
Prompts = io.Custom(forms.PROMPTS)
Conditionings = io.Custom("DGPO_CONDITIONINGS")
Sampler = io.Custom(forms.SAMPLER)
Group = io.Custom(forms.GROUP)
Reward = io.Custom(forms.REWARD)
Training = io.Custom(forms.TRAINING)
_EDGES = {
    forms.POLICY: Policy,
    forms.PROMPTS: Prompts,
    forms.SAMPLER: Sampler,
    forms.GROUP: Group,
    forms.REWARD: Reward,
    forms.TRAINING: Training,
}
_KINDS = {str: io.String, int: io.Int, float: io.Float, bool: io.Boolean}

About = str | Mapping[str, Any]
"""An input's tooltip, or several of its arguments."""

# What more than one node says of its inputs.
RUN: Mapping[str, About] = {
    "run": "Name of the run: its states are kept in output/dgpo/<run>.",
    "run_seed": {
        "min": 0,
        "max": SEEDS,
        "tooltip": "Seed of everything random in the run. Another seed is another run from the start.",
    },
}
ORDER: Mapping[str, About] = {
    "per_iteration": "Prompts, and so groups, in each iteration: more make a steadier step, and take longer.",
    "order_seed": {"min": 0, "max": SEEDS, "tooltip": "Seed of the order of the prompts."},
}
WEIGHTS: Mapping[str, About] = {
    "weights": {
        "options": ["current", "ema"],
        "tooltip": "The adapter's current weights, or their slow moving average: steadier, but far behind in a short"
        " run.",
    }
}


def inputs(form: forms.Form, **about: About) -> list[io.Input]:
    """The inputs of a form, in its order.

    about: what there is to say of single ones, by name; of a setting, its own help is said where nothing else is.
    """
    unknown = about.keys() - form.inputs.keys()
    if unknown:
        raise TypeError(f"{form.id} has no {min(unknown)}")
    return [_input(name, entry, about.get(name, {})) for name, entry in form.inputs.items()]


def weights_input(optional: bool = False) -> io.Input:
    """Which weights of the adapter to take."""
    (widget,) = inputs(forms.TRAINING_LOOP.part("weights"), weights={**WEIGHTS["weights"], "optional": optional})
    return widget


def first_error(*checks: tuple[Callable[[Any], Any], Any]) -> bool | str:
    """What `validate_inputs` answers: True, or the sentence of the first check that the value beside it fails.

    None passes: that is what a connected input is before anything runs.
    """
    for check, value in checks:
        if value is None:
            continue
        try:
            check(value)
        except UserError as error:
            return str(error)
    return True


def values(settings: type, given: Mapping[str, Any]) -> Any:
    """An instance of `settings` from what its widgets gave; other entries are left out. UserError for a bad value."""
    names = {field.name for field in dataclasses.fields(settings)}
    return read_settings(settings, {name: value for name, value in given.items() if name in names})


def _input(name: str, entry: forms.Widget | forms.Link, about: About) -> io.Input:
    about = {"tooltip": about} if isinstance(about, str) else dict(about)
    if entry.optional:
        about["optional"] = True
    if isinstance(entry, forms.Link):
        return _EDGES[entry.edge].Input(name, **about)
    if entry.setting:
        return _of_setting(name, entry, about)
    kind = io.Combo if "options" in about else _KINDS[entry.kind]
    return kind.Input(name, **{"default": entry.default, **about})


def _of_setting(name: str, widget: forms.Widget, about: Mapping[str, Any]) -> io.Input:
    """With the setting's own type, range, default and help, as far as nothing else is said."""
    group, field, kind, limits = _setting(widget.setting)
    default = field.default if widget.default is None else widget.default
    about = {"default": default, "tooltip": field_docs(group)[field.name], **about}
    if "options" in about or typing.get_origin(kind) is Literal:
        return io.Combo.Input(name, **{"options": list(typing.get_args(kind)), **about})
    if kind is bool:
        return io.Boolean.Input(name, **about)
    if kind is int:
        return io.Int.Input(name, **{"min": 0, "max": 1_000_000, **limits, **about})
    if kind is float:
        fine = 0 < field.default < 0.05 or field.name in ("clip", "kl_weight")
        step = FINE if fine else COARSE
        low = limits.get("min", 0.0) + (step if limits.get("open") else 0.0)
        high = limits.get("max", 1e6) - (step if limits.get("open_high") else 0.0)
        return io.Float.Input(name, **{"min": low, "max": high, "step": step, "round": step, **about})
    if isinstance(field.default, tuple):
        about["default"] = ", ".join(f"{item:g}" if isinstance(item, float) else item for item in field.default)
    return io.String.Input(name, **about)


@functools.cache
def _setting(name: str) -> tuple[type, dataclasses.Field, Any, Mapping[str, Any]]:
    """Of a setting such as "lora.rank": its group, its field there, its type, and the limits of its values."""
    group, _, leaf = name.rpartition(".")
    settings = typing.get_type_hints(Config)[group] if group else Config
    hint = typing.get_type_hints(settings, include_extras=True)[leaf]
    (field,) = (field for field in dataclasses.fields(settings) if field.name == leaf)
    if typing.get_origin(hint) is typing.Annotated:
        return settings, field, typing.get_args(hint)[0], _limits(hint)
    return settings, field, hint, {}


def _limits(hint: Any) -> dict[str, Any]:
    allowed = next(item for item in hint.__metadata__ if isinstance(item, Range))
    found: dict[str, Any] = {"open": True} if allowed.open_low else {}
    if allowed.open_high:
        found["open_high"] = True
    if allowed.low != float("-inf"):
        found["min"] = allowed.low
    if allowed.high != float("inf"):
        found["max"] = allowed.high
    if typing.get_args(hint)[0] is int:
        return {name: value for name, value in found.items() if name in ("min", "max")}
    return found
