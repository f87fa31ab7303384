"""What a LoRA file says of its making: written into files that are given away, and read back as a stranger's word.

Both ways by a list of what may pass, not of what may not. Written are numbers, choices between fixed words, the names
of rewards that are built in, and the base's name. No path, address, prompt, option of a reward or name of a variable is
ever in a file; and where somebody else's file holds any, it is not looked at.
"""

import json
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import parse_json, shown
from dgpo_core.evaluation.scores import evaluation_weights
from dgpo_core.rewards import REWARDS
from dgpo_core.settings import shipped
from dgpo_core.settings.config import PEOPLE, Config, DataConfig, Range, RewardTerm
from dgpo_core.settings.gates import Gate
from dgpo_core.settings.presets import preset_names
from dgpo_core.settings.resuming import base_settled
from dgpo_core.settings.schema import fixed_type, setting_types
from dgpo_core.settings.validation import validate
from dgpo_core.settings.values import from_dict, show_rewards, to_dict

OTHER = "other"
"""Stands for a reward that is not built in."""

_GROUPS = ("lora.", "rollout.", "training.", "evaluation.")
_NUMBERS = (
    "seed", "iterations", "combine", "model.dtype", "model.prediction", "model.quantize",
    "model.quantize_text", "model.height", "model.width", "model.distilled", "data.groups_per_iteration",
)  # fmt: skip
_WORDS = ("model.family", "rollout.solver", "rollout.scheduler", "evaluation.solver")
_READ = (
    "model.family", "model.dtype", "model.prediction", "model.quantize",
    "model.quantize_text", "model.height", "model.width",
    "rollout.solver", "evaluation.solver", "evaluation.steps", "evaluation.cfg", "evaluation.batch",
)  # fmt: skip
_WORD = re.compile(r"[\w+-]{0,40}")


@dataclass(frozen=True)
class Origin:
    """How a LoRA was made, as far as its file may say.

    base: the name of its base model, one that ships or what a path ended in; held_out: the word for the held-out
    prompts that it was measured on, empty where they do not ship with DGPO; step: the iterations of its training;
    measured: what its gain is told by, weights by the name of a reward, which may be any text; none where people were
    the reward. few_step_lora: what was merged into the base, by the word for one that ships, `OTHER` for any other.
    config: how it was drawn; all that is not in `_READ` is as by default.
    """

    base: str
    held_out: str
    step: int
    measured: Mapping[str, float]
    config: Config
    few_step_lora: str = ""


# --- writing ---------------------------------------------------------------------------------------------------------


def describe(config: Config, step: int) -> dict[str, str]:
    """The entries `dgpo.*` of a LoRA's header; what `read` takes from them is enough to measure it again."""
    preset = {"dgpo.preset": config.name} if config.name in preset_names() else {}
    return preset | {
        "dgpo.base": base_name(config.model.path),
        "dgpo.rewards": show_rewards(tuple(map(_public, config.reward))),
        "dgpo.step": str(step),
        "dgpo.config": json.dumps(_settings(config)),
    }


def base_name(path: str) -> str:
    """What a path, a hub id or an address ends in: the name of a model without where it lies."""
    return PureWindowsPath(re.split(r"[?#]", path)[0]).name


def _settings(config: Config) -> dict[str, Any]:
    """The settings that are written, in groups as in a settings file."""
    found: dict[str, Any] = {}
    for name, value in _flat(to_dict(base_settled(config))):
        group, _, leaf = name.rpartition(".")
        if _is_written(name, value):
            (found.setdefault(group, {}) if group else found)[leaf] = value
    found.setdefault("model", {})["path"] = base_name(config.model.path)
    if config.model.few_step_lora:
        found["model"]["few_step_lora"] = _merged(config.model.few_step_lora)
    found.setdefault("data", {})["held_out"] = _shipped(config.data.held_out, config.data.held_out_text)
    found["evaluation"]["reward"] = _known(config.evaluation.reward)
    found["reward"] = [{"name": _known(term.name), "weight": term.weight} for term in config.reward]
    return found


def _is_written(name: str, value: Any) -> bool:
    if name in _WORDS:
        return _WORD.fullmatch(value) is not None
    return name in _NUMBERS or (name.startswith(_GROUPS) and _is_number_or_choice(setting_types()[name]))


def _is_number_or_choice(hint: Any) -> bool:
    hint = fixed_type(hint)
    kind = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    parts = typing.get_args(kind) if typing.get_origin(kind) is tuple else (kind,)
    return all(part in (int, float, bool) or typing.get_origin(part) is Literal for part in parts)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _public(term: RewardTerm) -> RewardTerm:
    """The reward without its options, and without the name of what is not built in."""
    condition = ""
    if term.only_if:
        gate = Gate.of(term.only_if, term.name)
        condition = f"{_known(gate.reward)} {'>' if gate.above else '<'} {gate.bound:g}"
    return RewardTerm(_known(term.name), term.weight, only_if=condition)


def _merged(lora: str) -> str:
    return lora if not lora or lora in [*shipped.FEW_STEPS] else OTHER


def _known(name: str) -> str:
    return name if not name or name in REWARDS or name in PEOPLE else OTHER


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, metadata: Mapping[str, str]) -> Origin | None:
    """What the header of the LoRA at `path` says; None where DGPO did not write it.

    Raises UserError where it cannot be: no JSON, a number that is a text, one out of its range.
    """
    if not metadata.get("dgpo.config"):
        return None
    where = f"The entry dgpo.config in the header of the LoRA {shown(path)}"
    values = parse_json(metadata["dgpo.config"], where)
    if not isinstance(values, dict):
        raise UserError(f"{where} must be an object of settings, not {shown(values, 40)}.")
    groups = {group: _group(values, group, where) for group in ("model", "data", "rollout", "evaluation")}
    kept: dict[str, Any] = {}
    for name in _READ:
        group, _, leaf = name.partition(".")
        if leaf in groups[group]:
            kept.setdefault(group, {})[leaf] = groups[group][leaf]
    merged = _merged(_text(groups["model"].get("few_step_lora", ""), f"{where}: model.few_step_lora"))
    if merged in shipped.FEW_STEPS:
        kept.setdefault("model", {})["few_step_lora"] = merged
    config = from_dict(kept, replace(Config(), data=DataConfig(held_out="")), where)
    _require_words(config, where)
    validate(config)
    return Origin(
        base=base_name(_text(groups["model"].get("path", ""), f"{where}: model.path")),
        held_out=_shipped(groups["data"].get("held_out"), groups["data"].get("held_out_text")),
        step=_step(path, metadata),
        measured=_measured(values.get("reward"), groups["evaluation"].get("reward"), where),
        config=config,
        few_step_lora=merged,
    )


def _shipped(held_out: Any, text: Any) -> str:
    return held_out if held_out in [*shipped.HELD_OUT] and not text else ""


def _group(values: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    found = values.get(name, {})
    if not isinstance(found, dict):
        raise UserError(f"{where}: {name} must be a group of settings, not {shown(found, 40)}.")
    return found


def _require_words(config: Config, where: str) -> None:
    for word in (config.model.family, config.rollout.solver, config.evaluation.solver):
        if not _WORD.fullmatch(word):
            raise UserError(f"{where} holds {shown(word, 40)!r}, which names no solver and no family of models.")


def _measured(trained: Any, measuring: Any, where: str) -> dict[str, float]:
    """The weights of the rewards that tell the gain, as the settings of a run would have them."""
    name = _text(measuring or "", f"{where}: evaluation.reward")
    found = {name: 1.0} if name else _weights(trained, where)
    if set(found) & set(PEOPLE):
        return {}
    if not set(found) <= set(REWARDS):
        return found
    return evaluation_weights(replace(Config(), reward=tuple(RewardTerm(*pair) for pair in found.items())))


def _weights(terms: Any, where: str) -> dict[str, float]:
    """The rewards of a list, with their weights and nothing else of them."""
    if not isinstance(terms, list) or not terms:
        raise UserError(f"{where}: reward must be a list of rewards, not {shown(terms, 40)}.")
    found = {}
    for item in terms:
        if not isinstance(item, dict):
            raise UserError(f"{where}: a reward must be an object with a name, not {shown(item, 40)}.")
        weight = item.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not Range().holds(weight):
            raise UserError(f"{where}: the weight of a reward must be a number, not {shown(weight, 40)}.")
        found[_text(item.get("name"), f"{where}: the name of a reward")] = float(weight)
    return found


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be a text, not {shown(value, 40)}.")
    return value


def _step(path: Path, metadata: Mapping[str, str]) -> int:
    text = metadata.get("dgpo.step", "0")
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(
            f"The entry dgpo.step in the header of the LoRA {shown(path)} must be a whole number, not"
            f" {shown(text, 40)!r}."
        )
    return int(text)
