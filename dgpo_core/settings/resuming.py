"""What a resumed run may change, and the fingerprint of all that it may not."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dgpo_core.settings.config import AUTO, Config
from dgpo_core.settings.values import from_dict, to_dict

PERSONAL = ("name", "output", "resume", "track")
"""Where a run lives and how it was started: no part of what it computes."""

BATCHES = ("rollout.batch", "training.micro_batch", "evaluation.batch")

OPEN = (*BATCHES, "memory.gradient_checkpointing", "memory.offload", "model.quantize")
"""What may be left open, to be chosen from the card's memory."""

RESUMABLE = (*PERSONAL, *BATCHES, "iterations", "minutes", "evaluation.on_alarm")
"""What `--resume` may change besides the groups below: iterations (only up) and minutes, what only trades memory for
time, and whether an alarm ends the run."""

RESUMABLE_GROUPS = ("checkpoint.", "memory.", "model.device", "human.")


def left_open(config: Config) -> list[str]:
    """The dotted names of the settings that are "auto" and may be chosen from a card's memory."""
    values = dict(_flatten(to_dict(config)))
    return [name for name in OPEN if values[name] == AUTO]


def base_settled(config: Config) -> Config:
    """With what `model.quantize` stands for where nothing was chosen: a base that was begun whole stays whole."""
    return replace(config, model=replace(config.model, quantize=config.model.kept_as))


def filled(config: Config, others: Config) -> Config:
    """`config`, and what it leaves open as it is in `others`."""
    known, values = dict(_flatten(to_dict(others))), dict[str, dict[str, Any]]()
    for name in left_open(config):
        group, _, leaf = name.partition(".")
        values.setdefault(group, {})[leaf] = known[name]
    return from_dict(values, config)


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
        for name, value in _flatten(to_dict(base_settled(config)))
        if name not in RESUMABLE and not name.startswith(RESUMABLE_GROUPS)
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
