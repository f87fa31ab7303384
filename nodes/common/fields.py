"""Inputs of nodes, from the engine's forms and settings: one source for each name, default, range and line of help."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from comfy_api.v0_0_2 import io
from comfy_execution.utils import get_executing_context

from dgpo_core.comfy import forms
from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown
from dgpo_core.settings.config import AUTO, Config, Range
from dgpo_core.settings.schema import field_docs, fixed_type
from dgpo_core.settings.values import read_settings

from . import faults
from .words import WORDS, Word, on_screen

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
    forms.IMAGE: io.Image,
}
_KINDS = {str: io.String, int: io.Int, float: io.Float, bool: io.Boolean}
# What makes an input an advanced one, in a ComfyUI that knows such: 0.3.64 does not.
ADVANCED = {"advanced": True} if "advanced" in inspect.signature(io.Int.Input).parameters else {}

About = str | Mapping[str, Any]
"""An input's tooltip, or several of its arguments."""

# What more than one node says of its inputs, beside `WORDS`.
LATER: Mapping[str, Any] = {"optional": True, **ADVANCED}
RUN: Mapping[str, Mapping[str, Any]] = {"run_seed": {"min": 0, "max": SEEDS}}
ORDER: Mapping[str, About] = {"order_seed": {"min": 0, "max": SEEDS}}
WEIGHTS: Mapping[str, Mapping[str, Any]] = {"weights": {"options": ["current", "ema"]}}


def inputs(form: forms.Form, advanced: Collection[str] = (), **about: About) -> list[io.Input]:
    """The inputs of a form, in its order.

    advanced: those that the front end shows on request. about: what there is to say of single ones, by name, beside
    `WORDS`; of a setting, its own help is said where nothing else is.
    """
    unknown = {*about, *advanced} - form.inputs.keys()
    if unknown:
        raise TypeError(f"{form.id} has no {min(unknown)}")
    return [
        _input(name, entry, {**_as_dict(about.get(name, {})), **(ADVANCED if name in advanced else {})})
        for name, entry in form.inputs.items()
    ]


def aliases(*words: str) -> dict[str, list[str]]:
    """What a schema says of other words that its node is found by; nothing in a ComfyUI that does not ask (0.3.64)."""
    return {"search_aliases": list(words)} if "search_aliases" in inspect.signature(io.Schema).parameters else {}


def weights_input(optional: bool = False) -> io.Input:
    """Which weights of the adapter to take."""
    (widget,) = inputs(forms.TRAINING_LOOP.part("weights"), weights={**WEIGHTS["weights"], "optional": optional})
    return widget


def first_error(**checks: tuple[Callable[[Any], Any], Any]) -> bool | str:
    """What `validate_inputs` answers: True, the sentence of the first check that the value beside it fails, or else
    what the graph as a whole says of the node.

    checks: by the input that is at fault, which is a text. None passes: that is what a connected input is before
    anything runs.
    """
    for name, (check, value) in checks.items():
        if value is None:
            continue
        try:
            if not isinstance(value, str):  # of a graph that no front end has made
                raise UserError(f"{shown(value)} is no text: choose or write one.")
            check(value)
        except UserError as error:
            return faults.note(faults.Fault(name, on_screen(str(error))))
    context = get_executing_context()
    fault = faults.of_node(str(context.node_id)) if context is not None else None
    return True if fault is None else faults.note(fault)


def values(settings: type, given: Mapping[str, Any]) -> Any:
    """An instance of `settings` from what its widgets gave; other entries are left out. UserError for a bad value."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    own = {name: value for name, value in given.items() if name in defaults}
    return read_settings(settings, {name: forms.as_setting(value, defaults[name]) for name, value in own.items()})


def _as_dict(about: About) -> Mapping[str, Any]:
    return {"tooltip": about} if isinstance(about, str) else about


def _input(name: str, entry: forms.Widget | forms.Link, about: Mapping[str, Any]) -> io.Input:
    word = WORDS.get(name, Word())
    said = {"display_name": word.label, "tooltip": word.help}
    about = {**{what: text for what, text in said.items() if text}, **about}
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
    if default == AUTO and kind is not bool and typing.get_origin(kind) is not Literal:  # a text in a number's widget
        default, limits = forms.OPEN, {**limits, "min": forms.OPEN}
    about = {"default": True if default == AUTO and kind is bool else default, **about}
    about.setdefault("tooltip", field_docs(group)[field.name])
    if "options" in about or typing.get_origin(kind) is Literal:
        options = [option for option in typing.get_args(kind) if option != AUTO or default == AUTO]
        return io.Combo.Input(name, **{"options": options, **about})
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
    hint = fixed_type(typing.get_type_hints(settings, include_extras=True)[leaf])
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
