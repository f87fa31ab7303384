"""Does it fit, and if not, which settings make it fit: each is counted anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from dgpo_core.benchmark.count import Phase
from dgpo_core.evaluation.evaluator import SAMPLE_PROMPTS, SAMPLES_EACH
from dgpo_core.settings.config import Config

GIB = 2**30
GAPS = 0.3 * GIB
"""Bytes of those that are free on a card that no tensor can have: gaps between tensors. Assumed."""
RESERVE = 0.5 * GIB + GAPS
"""Bytes of a whole card that no tensor can have: the driver's context and torch's kernels, too. Assumed."""
SHORT = {True: 1.05, False: 1.12}
"""By so much an H100 took more than was counted, with checkpointing and without."""

SAMPLES = SAMPLE_PROMPTS * SAMPLES_EACH
"""Pictures in samples/, which are drawn as an evaluation's are."""

Counted = Mapping[str, Phase]
Count = Callable[[Config], Counted]


@dataclass(frozen=True)
class Change:
    """One setting that takes less memory. phase: the one that it was changed for; before, after: bytes of its peak."""

    setting: str
    value: object
    phase: str
    before: int
    after: int

    def __str__(self) -> str:
        saved = (self.before - self.after) / GIB
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"--{self.setting} {value}: {saved:.1f} GiB less in {self.phase}"


def peak(counted: Counted) -> tuple[str, int]:
    """The phase that takes the most, and its bytes."""
    name = max(counted, key=lambda phase: counted[phase].bytes)
    return name, counted[name].bytes


def evaluated_at_once(config: Config) -> int:
    """The most images that an evaluation of the run, the last one among them, or samples/ draw at once."""
    e = config.evaluation
    most = max(e.images, e.final_images, SAMPLES)
    return min(e.at_once or most, most)


def make_fit(config: Config, counted: Counted, room: float, count: Count) -> tuple[Config, Counted, list[Change]]:
    """The settings that fit into `room` bytes, or the smallest that there are; their count; what was changed.

    Only settings that do not change the result are: what is computed again, moved away, or done in smaller parts.
    """
    changes: list[Change] = []
    while peak(counted)[1] > room:
        name, before = peak(counted)
        for setting, value in _smaller(config, name):
            tried = _with(config, setting, value)
            found = count(tried)
            if found[name].bytes < before:
                changes.append(Change(setting, value, name, before, found[name].bytes))
                config, counted = tried, found
                break
        else:
            break
    return config, counted, changes


def _smaller(config: Config, phase: str) -> Iterator[tuple[str, int | bool]]:
    """Settings that may lower the peak of a phase, what costs the least time first."""
    if not config.memory.move:
        yield "memory.offload", True
    if phase == "update":
        if not config.memory.recompute:
            yield "memory.gradient_checkpointing", True
        if config.training.at_once > 1:
            yield "training.micro_batch", config.training.at_once // 2
    whole = config.rollout.group_size * config.data.groups_per_iteration
    batches = {
        "draw": ("rollout.batch", config.rollout.at_once or whole),
        "decode": ("rollout.batch", config.rollout.at_once or whole),
        "evaluation": ("evaluation.batch", evaluated_at_once(config)),
    }
    if phase in batches:
        setting, batch = batches[phase]
        if batch > 1:
            yield setting, batch // 2


def _with(config: Config, setting: str, value: object) -> Config:
    group, _, leaf = setting.partition(".")
    return replace(config, **{group: replace(getattr(config, group), **{leaf: value})})
