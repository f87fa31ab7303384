"""The presets of Training Settings as values of its widgets, for the page to show. Nothing here knows ComfyUI."""

from dataclasses import asdict
from typing import Any

from dgpo_core.comfy.forms import AS_BELOW, as_widget, chosen_preset, preset_choices
from dgpo_core.settings.config import TrainingConfig


def preset_values() -> dict[str, dict[str, Any]]:
    """What each option of the combo `preset` stands for: widget name -> value. A mode says nothing of `combine`."""
    presets = {choice: chosen_preset(choice) for choice in preset_choices() if choice != AS_BELOW}
    return {
        choice: {**({"combine": combine} if combine else {}), **widget_values(training)}
        for choice, (training, combine) in presets.items()
    }


def widget_values(training: TrainingConfig) -> dict[str, Any]:
    """The settings as their widgets hold them: lists are texts with commas."""
    values = asdict(training).items()
    return {name: _as_text(value) if isinstance(value, tuple) else as_widget(value) for name, value in values}


def _as_text(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
