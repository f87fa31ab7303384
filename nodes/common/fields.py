"""Widgets from the engine's settings: one source for each default, range and line of help."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from comfy_api.v0_0_2 import io

from dgpo_core.settings.config import DataConfig, EvalConfig, ModelConfig, Range
from dgpo_core.settings.schema import field_docs
from dgpo_core.settings.values import read_settings

FINE, COARSE = 1e-6, 0.01  # steps of float widgets
SEEDS = 2**32 - 1

Policy = io.Custom("DGPO_POLICY")
Prompts = io.Custom("DGPO_PROMPTS")
Conditionings = io.Custom("DGPO_CONDITIONINGS")
Sampler = io.Custom("DGPO_SAMPLER")
Group = io.Custom("DGPO_GROUP")
Reward = io.Custom("DGPO_REWARD")
Training = io.Custom("DGPO_TRAINING")


def widgets(settings: type, *names: str, **options: Mapping[str, Any]) -> list[io.Input]:
    """One widget per named field of a settings dataclass (all where none is named).

    options: further arguments of single widgets, such as `options=[...]` to choose a text from.
    """
    hints = typing.get_type_hints(settings, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(settings)}
    return [_widget(settings, fields[name], hints[name], options.get(name, {})) for name in names or fields]


def run_widgets() -> list[io.Input]:
    """The name and the seed of a run."""
    return [
        io.String.Input("run", default="my_run", tooltip="Name of the run: its states are kept in output/dgpo/<run>."),
        io.Int.Input(
            "run_seed",  # the front end would draw a widget called "seed" anew at every press
            default=0,
            min=0,
            max=SEEDS,
            tooltip="Seed of everything random in the run. Another seed is another run from the start.",
        ),
    ]


def order_widgets() -> list[io.Input]:
    """How many prompts an iteration takes, and in which order."""
    return [
        io.Int.Input(
            "per_iteration",
            **{"default": 8, **_limits(typing.get_type_hints(DataConfig, include_extras=True)["groups_per_iteration"])},
            tooltip="Prompts, and so groups, in each iteration: more make a steadier step, and take longer.",
        ),
        io.Int.Input("order_seed", default=0, min=0, max=SEEDS, tooltip="Seed of the order of the prompts."),
    ]


def prediction_widget() -> io.Input:
    """What a model predicts. The last widget of its nodes, and optional: older workflows go on without it."""
    (widget,) = widgets(ModelConfig, "prediction", prediction={"optional": True})
    return widget


def weights_input(optional: bool = False) -> io.Input:
    """Which weights of the adapter to take."""
    return io.Combo.Input(
        "weights",
        options=["current", "ema"],
        default=EvalConfig().weights,
        optional=optional,
        tooltip="The adapter's current weights, or their slow moving average: steadier, but far behind in a short run.",
    )


def values(settings: type, given: Mapping[str, Any]) -> Any:
    """An instance of `settings` from what its widgets gave; other entries are left out. UserError for a bad value."""
    names = {field.name for field in dataclasses.fields(settings)}
    return read_settings(settings, {name: value for name, value in given.items() if name in names})


def _widget(settings: type, field: dataclasses.Field, hint: Any, options: Mapping[str, Any]) -> io.Input:
    kind, limits = hint, {}
    if typing.get_origin(hint) is typing.Annotated:
        kind, limits = typing.get_args(hint)[0], _limits(hint)
    about = {"default": field.default, "tooltip": field_docs(settings)[field.name], **options}
    if "options" in about or typing.get_origin(kind) is Literal:
        return io.Combo.Input(field.name, **{"options": list(typing.get_args(kind)), **about})
    if kind is bool:
        return io.Boolean.Input(field.name, **about)
    if kind is int:
        return io.Int.Input(field.name, **{"min": 0, "max": 1_000_000, **limits, **about})
    if kind is float:
        fine = 0 < field.default < 0.05 or field.name in ("clip", "kl_weight")
        step = FINE if fine else COARSE
        low = limits.get("min", 0.0) + (step if limits.get("open") else 0.0)
        high = limits.get("max", 1e6) - (step if limits.get("open_high") else 0.0)
        return io.Float.Input(field.name, **{"min": low, "max": high, "step": step, "round": step, **about})
    if isinstance(field.default, tuple):
        about["default"] = ", ".join(f"{item:g}" if isinstance(item, float) else item for item in field.default)
    return io.String.Input(field.name, **about)


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
