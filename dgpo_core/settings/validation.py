"""Whether settings can work: ranges, and what must fit together."""

import typing
from dataclasses import replace
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import check_folder_name
from dgpo_core.settings.config import (
    AUTO,
    HUMAN,
    MOST_FEW_STEPS,
    RATINGS,
    Config,
    Range,
    RewardTerm,
    RolloutConfig,
    TrainingConfig,
    show_number,
)
from dgpo_core.settings.gates import check_rewards
from dgpo_core.settings.schema import fixed_type, setting_types, types_of


def validate(config: Config) -> None:
    """Raises UserError for the first number out of its range or combination that cannot work.

    Names of rewards, solvers, models and files are checked by those who know them.
    """
    if config.rollout.group_size < 2:
        raise UserError(
            f"rollout.group_size is {config.rollout.group_size} but must be at least 2: DGPO learns from comparing the"
            " images of one prompt with each other, and one image has nothing to be compared with."
        )
    for name, hint in setting_types().items():
        value = _get(config, name)
        check_range(name, hint, value)
        if "\0" in (value if isinstance(value, str | tuple) else ""):
            raise UserError(f"{name} holds a character that no file name or text can hold (NUL): remove it.")
    check_folder_name(config.name)
    _check_names(config)
    check_timesteps(config.rollout, config.training)


def check_ranges(settings: Any) -> None:
    """Raises UserError for the first number of a dataclass of settings that is out of its range."""
    for name, hint in types_of(settings.__class__).items():
        check_range(name, hint, getattr(settings, name))


def _get(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def check_range(name: str, hint: Any, value: Any) -> None:
    if value == AUTO:
        return
    hint = fixed_type(hint)
    ranges = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Range)]
    if typing.get_origin(hint) is float or hint is float:
        ranges.append(Range())
    for allowed in ranges:
        for number in value if isinstance(value, tuple) else (value,):
            if not allowed.holds(number):
                raise UserError(f"{name} is {show_number(number)} but must be {allowed}.")


def for_groups(config: Config) -> Config:
    """Where a folder of rated images is trained on, its ratings are the reward."""
    return replace(config, reward=(RewardTerm(RATINGS),)) if config.groups else config


def _check_people(config: Config) -> None:
    """Raises UserError where people cannot be what the settings take them for."""
    if config.evaluation.reward in (HUMAN, RATINGS):
        raise UserError(f"evaluation.reward is {config.evaluation.reward}: name one that can score images by itself.")
    if any(term.name == RATINGS for term in config.reward) and not config.groups:
        raise UserError("The reward ratings needs a folder of rated images: give it with --groups FOLDER.")


def _check_names(config: Config) -> None:
    _check_people(config)
    if not config.data.prompts and not config.data.text and not config.groups:
        raise UserError(
            "There are no training prompts: give --data.prompts FILE (.txt or .jsonl); `python -m dgpo_core.prompts`"
            " writes some for the rewards geneval and ocr."
        )
    check_rewards(config.reward)
    names = [term.name for term in config.reward]
    for term in config.watch:
        if term.name in names:
            raise UserError(f"{term.name} is trained, so it cannot be watched as well: leave it out of watch.")
        if term.weight != 1.0 or term.only_if:
            raise UserError(f"{term.name} is only watched and has no weight or condition: give its name alone.")
    check_distilled(config.model.distilled)
    for side in ("height", "width"):
        if getattr(config.model, side) % 8:
            raise UserError(f"model.{side} is {getattr(config.model, side)} but must be a multiple of 8.")


def check_distilled(value: str) -> None:
    """Raises UserError for what model.distilled cannot be."""
    number = int(value) if value.isascii() and value.isdecimal() and len(value) < 4 else 0
    if value not in ("auto", "no") and not 1 <= number <= MOST_FEW_STEPS:
        raise UserError(
            f"model.distilled is {value[:40]!r}, but must be auto, no, or the number of steps that the model is made"
            f" for, 1 to {MOST_FEW_STEPS}."
        )


def check_timesteps(rollout: RolloutConfig, training: TrainingConfig) -> None:
    """Raises UserError where the training timesteps do not fit the roll-out's."""
    steps = rollout.steps
    if training.t_min >= 1:
        if training.t_min != int(training.t_min) or training.t_min > steps:
            raise UserError(
                f"training.t_min is {training.t_min:g} but must be a noise level below 1 or a whole number of"
                f" roll-out steps, at most rollout.steps ({steps})."
            )
        if training.timestep_source == "uniform":
            raise UserError(
                f"training.t_min is {training.t_min:g} roll-out steps, but with training.timestep_source uniform it"
                " must be a noise level below 1."
            )
    there_are = int(training.t_min) if training.t_min >= 1 else steps
    if training.timestep_source == "rollout" and training.timesteps > there_are:
        raise UserError(
            f"training.timesteps is {training.timesteps} but only {there_are} roll-out steps may be trained on"
            " (rollout.steps, training.t_min)."
        )
