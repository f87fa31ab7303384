"""Settings to and from dicts, YAML files and presets; their validation; what a resumed run may change."""

import ast
import difflib
import hashlib
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import check_folder_name
from dgpo_core.common.reading import parse_yaml, read_text, shown
from dgpo_core.settings.config import (
    HUMAN,
    RATINGS,
    Config,
    Range,
    RewardTerm,
    RolloutConfig,
    TrainingConfig,
    show_number,
)
from dgpo_core.settings.gates import check_rewards

MODES = ("1", "2a", "2b")
"""The official README's three modes; `presets/modes/` holds what each one sets."""

PERSONAL = ("name", "output", "resume")
"""Where a run lives and how it was started: no part of what it computes."""

MOST_BYTES = 2**20
"""Of a file of settings."""

BATCHES = ("rollout.batch", "training.micro_batch", "evaluation.batch")

RESUMABLE = (*PERSONAL, *BATCHES, "iterations", "evaluation.on_alarm")
"""What `--resume` may change besides the groups below: iterations (only up), what only trades memory for time, and
whether an alarm ends the run."""

RESUMABLE_GROUPS = ("checkpoint.", "memory.", "model.device", "human.")


def suggest(name: str, known: Collection[str], mark: str = "") -> str:
    """How a sentence about an unknown `name` ends: with the nearest known name, or with all where none is near.

    `mark` is put before a name, such as the dashes of an option.
    """
    same_leaf = [candidate for candidate in known if candidate.rpartition(".")[2] == name.rpartition(".")[2]]
    near = same_leaf or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f", did you mean {' or '.join(mark + candidate for candidate in near)}?"
    return f"; known: {', '.join(sorted(known))}." if len(known) <= 15 else "."


# --- dicts -----------------------------------------------------------------------------------------------------------


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as plain data for YAML and JSON, without `resume`, which says how the run was started."""
    plain = to_plain(config)
    del plain["resume"]
    return plain


def to_plain(settings: Any) -> dict[str, Any]:
    """Any dataclass of settings as plain data for YAML and JSON."""
    return _plain(asdict(settings))


def from_dict(values: Mapping[str, Any], base: Config | None = None, source: str = "settings") -> Config:
    """`base` (default: `Config()`) with `values` laid over it; nested groups may be partial.

    Raises UserError, starting with `source`, for an unknown key (naming the nearest) or a value of the wrong type.
    """
    return _read_group(base or Config(), values, "", source)


def read_settings(group: type, values: Mapping[str, Any]) -> Any:
    """One group of settings, such as `TrainingConfig`, from values that forms and widgets give: lists may be texts
    with commas. Raises UserError for a value of the wrong type or out of its range."""
    hints = _hints(group)
    given = {name: _split(value) if _is_list(hints.get(name)) else value for name, value in values.items()}
    settings = _read_group(group(), given, "", group.__name__.removesuffix("Config").lower())
    for name, hint in hints.items():
        _check_range(name, hint, getattr(settings, name))
    return settings


def _is_list(hint: Any) -> bool:
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    return typing.get_origin(hint) is tuple


def _split(value: Any) -> Any:
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _read_group(base: Any, values: Any, prefix: str, source: str) -> Any:
    if not isinstance(values, Mapping):
        where = prefix.rstrip(".") or "the file"
        raise UserError(f"{source}: {where} must hold 'name: value' lines, not {_show(values)}.")
    hints = _hints(type(base))
    changes = {}
    for key, value in values.items():
        if key not in hints:
            known = [prefix + name for name in hints] if prefix else list(setting_types())
            name = f"{prefix}{shown(key, 60)}"
            raise UserError(f"{source}: there is no setting {name}{suggest(name, known)}")
        current = getattr(base, key)
        if is_dataclass(current):
            changes[key] = _read_group(current, value, f"{prefix}{key}.", source)
        else:
            changes[key] = _read_value(hints[key], value, f"{source}: {prefix}{key}")
    return replace(base, **changes)


def _read_value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _read_value(arguments[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where} must be one of {', '.join(arguments)}, not {_show(value)}.")
        return value
    if arguments and arguments[0] is RewardTerm:
        return read_rewards(value, where)
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if hint is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as text
        except (ValueError, OverflowError):
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    kind = {float: "a number", int: "a whole number", bool: "true or false", str: "text (put it in quotes)"}[hint]
    raise UserError(f"{where} must be {kind}, not {_show(value)}.")


def _read_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where} must be a list, not {_show(value)}.")
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise UserError(f"{where} must hold {len(arguments)} values, not {len(value)}.")
    return tuple(_read_value(arguments[0], item, where) for item in value)


def read_rewards(value: Any, where: str = "reward") -> tuple[RewardTerm, ...]:
    """Rewards from `"a=1,b=2?a>0.3"`, from `{a: 1.0, b: 0.5}` or from a list of `{name, weight, options, only_if}`."""
    if isinstance(value, str):
        return tuple(_read_reward(item.strip(), where) for item in value.split(",") if item.strip())
    if isinstance(value, Mapping):
        return tuple(_read_reward({"name": name, "weight": weight}, where) for name, weight in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_read_reward(item, where) for item in value)
    raise UserError(f"{where} must be NAME=WEIGHT,... or a list of rewards, not {_show(value)}.")


def _read_reward(item: Any, where: str) -> RewardTerm:
    if isinstance(item, str):
        term, _, only_if = item.partition("?")
        name, equals, weight = term.partition("=")
        item = {"name": name.strip(), "only_if": only_if, **({"weight": weight.strip()} if equals else {})}
    if not isinstance(item, Mapping) or not item.get("name"):
        raise UserError(f"{where} must give each reward a name, as in pickscore=1.0, not {_show(item)}.")
    known = [field.name for field in fields(RewardTerm)]
    for key in item:
        if key not in known:
            raise UserError(f"{where}: a reward has no {key}{suggest(str(key), known)}")
    options = item.get("options") or {}
    if not isinstance(options, Mapping):
        raise UserError(f"{where}: the options of {item['name']} must be 'name: value' lines, not {_show(options)}.")
    weight = _read_value(float, item.get("weight", 1.0), f"{where}: the weight of {item['name']}")
    only_if = _read_value(str, item.get("only_if", ""), f"{where}: the condition of {item['name']}").strip()
    return RewardTerm(_read_value(str, item["name"], where), weight, dict(options), only_if)


def show_rewards(rewards: tuple[RewardTerm, ...]) -> str:
    """`"a=1.0,b=0.5?a>0.3"`: what `read_rewards` reads, without options."""
    return ",".join(f"{t.name}={t.weight:g}" + (f"?{t.only_if}" if t.only_if else "") for t in rewards)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@cache
def field_docs(group: type) -> Mapping[str, str]:
    """The line of documentation under each field of a dataclass of settings, by the field's name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(group))).body[0].body
    return types.MappingProxyType(
        {
            field.target.id: inspect.cleandoc(text.value.value).replace("\n", " ")
            for field, text in pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        }
    )


@cache
def _hints(group: type) -> dict[str, Any]:
    return typing.get_type_hints(group, include_extras=True)


@cache
def setting_types(group: type = Config, prefix: str = "") -> Mapping[str, Any]:
    """Every setting's dotted name, such as `training.lr`, and its annotation."""
    found: dict[str, Any] = {}
    for name, hint in _hints(group).items():
        group_or_type = getattr(hint, "__origin__", hint)  # what Annotated wraps
        nested = is_dataclass(group_or_type)
        found |= setting_types(group_or_type, f"{prefix}{name}.") if nested else {prefix + name: hint}
    return types.MappingProxyType(found)


# --- YAML and presets ------------------------------------------------------------------------------------------------


def to_yaml(config: Config) -> str:
    """The resolved settings as a YAML file that `load_yaml` and `--config` read back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def load_yaml(path: str | Path, base: Config | None = None) -> Config:
    """Settings from the file at `path`, laid over `base`. Raises UserError for whatever is wrong with the file."""
    what = f"The settings file {shown(path)}"
    return _laid_over(base, parse_yaml(read_text(path, "The settings file", MOST_BYTES), what), str(path))


def preset_names() -> list[str]:
    """What `--preset` takes."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _presets().iterdir() if entry.name.endswith(".yaml"))


def load_preset(name: str, base: Config | None = None) -> Config:
    """The preset `name`, laid over `base`; its run is called after it. Raises UserError for an unknown name."""
    if name not in preset_names():
        raise UserError(f"There is no preset {name}{suggest(name, preset_names())}")
    return replace(_shipped(f"{name}.yaml", base, f"preset {name}"), name=name)


def apply_mode(config: Config, mode: str) -> Config:
    """`config` with the settings of mode 1, 2a or 2b (roll-outs with or without CFG, frozen or moving reference)."""
    if mode not in MODES:
        raise UserError(f"There is no mode {mode}; known: {', '.join(MODES)}.")
    return _shipped(f"modes/mode-{mode}.yaml", config, f"mode {mode}")


def _presets() -> Traversable:
    return files("dgpo_core.settings").joinpath("presets")


def _shipped(name: str, base: Config | None, source: str) -> Config:
    """What one of the package's own files lays over `base`."""
    return _laid_over(base, parse_yaml(_presets().joinpath(name).read_text(encoding="utf-8"), source), source)


def _laid_over(base: Config | None, values: Any, source: str) -> Config:
    return from_dict({} if values is None else values, base, source)


# --- validation ------------------------------------------------------------------------------------------------------


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
        _check_range(name, hint, value)
        if "\0" in (value if isinstance(value, str | tuple) else ""):
            raise UserError(f"{name} holds a character that no file name or text can hold (NUL): remove it.")
    check_folder_name(config.name)
    _check_names(config)
    check_timesteps(config.rollout, config.training)


def check_ranges(settings: Any) -> None:
    """Raises UserError for the first number of a dataclass of settings that is out of its range."""
    for name, hint in _hints(type(settings)).items():
        _check_range(name, hint, getattr(settings, name))


def _get(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _check_range(name: str, hint: Any, value: Any) -> None:
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
    for side in ("height", "width"):
        if getattr(config.model, side) % 8:
            raise UserError(f"model.{side} is {getattr(config.model, side)} but must be a multiple of 8.")


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


# --- resuming --------------------------------------------------------------------------------------------------------


def differences(saved: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """What a resumed run may not change but `new` does: dotted name -> its value in `saved` and in `new`."""
    old, now = _training_settings(saved), _training_settings(new)
    return {name: (old[name], now[name]) for name in now if old[name] != now[name]}


def fingerprint(config: Config) -> str:
    """A short hash of everything that `differences` compares, for checkpoints to carry.

    Settings at their default do not enter, so that one added by a later version leaves it as it is.
    """
    changed = differences(Config(), config)
    text = json.dumps([[name, value] for name, (_, value) in sorted(changed.items())])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _training_settings(config: Config) -> dict[str, Any]:
    return {
        name: value
        for name, value in _flatten(to_dict(config))
        if name not in RESUMABLE and not name.startswith(RESUMABLE_GROUPS)
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
