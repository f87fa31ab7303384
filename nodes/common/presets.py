"""The presets of Training Settings as values of its widgets, for the page to show. Nothing here knows ComfyUI."""

from dataclasses import asdict
from typing import Any

from dgpo_core.settings.config import Config, TrainingConfig
from dgpo_core.settings.presets import MODES, apply_mode, load_preset, preset_names


def preset_values() -> dict[str, dict[str, Any]]:
    """What each option of the combo `preset` stands for: widget name -> value. A mode says nothing of `combine`."""
    presets = {name: load_preset(name) for name in preset_names()}
    values = {name: {"combine": preset.combine, **widget_values(preset.training)} for name, preset in presets.items()}
    modes = {f"mode {mode}": widget_values(apply_mode(Config(), mode).training) for mode in MODES}
    return values | modes


def widget_values(training: TrainingConfig) -> dict[str, Any]:
    """The settings as their widgets hold them: lists are texts with commas."""
    return {name: _as_text(value) if isinstance(value, tuple) else value for name, value in asdict(training).items()}


def _as_text(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
