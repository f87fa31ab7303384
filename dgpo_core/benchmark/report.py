"""What a training takes, as a table, as sentences and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dgpo_core.benchmark.advice import GIB, RESERVE, Change, Counted, make_fit, peak
from dgpo_core.benchmark.cards import BANDWIDTH, BUS, CARDS, SHARE, START, Card, seconds
from dgpo_core.benchmark.choose import STAND_IN, choose, others_that_take_less, probe
from dgpo_core.benchmark.count import KINDS, Phase
from dgpo_core.benchmark.iteration import count_without_weights
from dgpo_core.benchmark.models import policy_without_weights
from dgpo_core.runs.assemble import set_up
from dgpo_core.settings.config import Config
from dgpo_core.settings.resuming import OPEN, left_open
from dgpo_core.settings.values import to_dict

ITERATION = ("draw", "decode", "update")
"""The phases of every iteration; a prompt is encoded once per run."""


@dataclass(frozen=True)
class Report:
    """What was counted, for the settings as they are; and where that is too much, what was changed until it fits.

    model: in words. size: height and width in pixels. room: bytes that tensors can have, infinite where no card is
    given. fitted: the count after `changes`, and by `config` the settings then. chosen: in a line, for what the
    settings left open; empty where that is nothing, or no room is known.
    """

    model: str
    size: tuple[int, int]
    card: Card | None
    room: float
    counted: Counted
    config: Config
    fitted: Counted
    changes: list[Change]
    chosen: str = ""

    @staticmethod
    def of(config: Config, random: str, card: Card | None, vram: float) -> Report:
        """Counts; vram: GiB of the card, 0 for those of `card`. Raises UserError for a model that is not there."""
        gib = vram or (card.memory if card else math.inf)
        room = gib * GIB - RESERVE
        said: list[str] = []
        sizes: list[tuple[int, int]] = []

        def count(settings: Config) -> Counted:
            policy, model = policy_without_weights(settings, random)
            size = set_up(policy, settings)
            said.append(model)
            sizes.append(size)
            return count_without_weights(policy, settings, size, room=room)

        line = ""
        if left_open(config) and room < math.inf:
            choice = choose(config, room, probe(room, random), card or STAND_IN)
            config, line = choice.config, choice.said
        counted = count(config)
        fitting, fitted, changes = make_fit(config, counted, room, count)
        return Report(said[0], sizes[0], card, room, counted, fitting, fitted, changes, line)

    @property
    def fits(self) -> bool:
        """Whether the settings fit, after the changes."""
        return peak(self.fitted)[1] <= self.room

    def seconds(self, counted: Counted) -> dict[str, float]:
        """Seconds of one iteration by phase, and of one evaluation during the training."""
        if self.card is None:
            return {}
        found = {name: seconds(counted[name].kernels, self.card) for name in ITERATION}
        found["evaluation"] = self.config.evaluation.images * self._evaluated(counted["evaluation"], self.card)
        return found

    @staticmethod
    def _evaluated(phase: Phase, card: Card) -> float:
        """Seconds of one image of an evaluation, drawn as many at once as were counted."""
        return seconds(phase.kernels, card) / phase.images

    def hours(self, counted: Counted) -> float:
        """Hours of a run, with its evaluations and the measurement before and after; 0 without a card."""
        if self.card is None:
            return 0.0
        took, e = self.seconds(counted), self.config.evaluation
        times = (self.config.iterations - 1) // e.every if e.every else 0  # after the last one the final ones are
        images = times * e.images + 2 * e.final_images  # the base before, the adapter after
        whole = self.config.iterations * sum(took[name] for name in ITERATION)
        return (whole + images * self._evaluated(counted["evaluation"], self.card)) / 3600

    def as_json(self) -> dict[str, Any]:
        """Everything, for --json."""
        name, most = peak(self.counted)
        found = {
            "model": self.model,
            "height": self.size[0],
            "width": self.size[1],
            "phases": {phase: _plain(took) for phase, took in self.counted.items()},
            "peak": {"phase": name, "bytes": most},
            "room": None if self.room == math.inf else int(self.room),
            "fits": most <= self.room,
            "changes": [{"setting": c.setting, "value": c.value, "saves": c.before - c.after} for c in self.changes],
            "fits_after_changes": self.fits,
            "settings": {name: to_dict(self.config)[name.split(".")[0]][name.split(".")[1]] for name in OPEN},
        }
        if self.card:
            assumed = {
                "share_of_arithmetic": SHARE, "share_of_bandwidth": BANDWIDTH, "share_of_bus": BUS,
                "seconds_per_kernel": START,
            }  # fmt: skip
            took = self.seconds(self.counted)
            found |= {"card": self.card.name, "seconds": took, "hours": self.hours(self.counted), "assumed": assumed}
        return found


def _plain(phase: Phase) -> dict[str, Any]:
    return {
        "bytes": phase.bytes,
        "by_kind": phase.peak,
        "flops": phase.flops,
        "kernels": sum(phase.kernels.values()),
        "forwards": phase.forwards,
        "backwards": phase.backwards,
    }


def table(report: Report) -> str:
    """The count by phase: GiB at the peak, TFLOP, images that go forth and back, seconds."""
    took = report.seconds(report.counted)
    kinds = [kind for kind in KINDS if any(phase.peak.get(kind, 0) for phase in report.counted.values())]
    head = ["phase", "GiB", *kinds, "TFLOP", "forwards", "backwards", *(["seconds"] if took else [])]
    rows = [head]
    for name, phase in report.counted.items():
        row = [name, f"{phase.bytes / GIB:.2f}", *(f"{phase.peak.get(kind, 0) / GIB:.2f}" for kind in kinds)]
        row += [f"{phase.flops / 1e12:.1f}", str(phase.forwards), str(phase.backwards)]
        rows.append([*row, *([f"{took[name]:.1f}" if name in took else ""] if took else [])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    title = f"{report.model}, {report.size[0]} x {report.size[1]} pixels"
    return "\n".join([title, *lines])


def verdict(report: Report) -> str:
    """Does it fit, what to change, and how long it takes: a line each."""
    return "\n".join([*filter(None, [report.chosen]), *_fit_lines(report), *_time_lines(report)])


def _fit_lines(report: Report) -> Iterator[str]:
    name, most = peak(report.counted)
    if report.room == math.inf:
        yield f"It takes {most / GIB:.1f} GiB, the most in {name}; give --vram or --card to see whether that fits."
        if name == "encode" and report.config.memory.move:
            name, most = peak({phase: took for phase, took in report.counted.items() if phase != "encode"})
            yield (
                f"On a card with less the network makes room while prompts are encoded: then it is {most / GIB:.1f} GiB"
                f" at most, in {name}, or what the text encoders take alone."
            )
        return
    of = f"{most / GIB:.1f} of {report.room / GIB:.1f} GiB ({RESERVE / GIB:.1f} are left to the driver)"
    if most <= report.room:
        yield f"It fits: {of}, the most in {name}."
        return
    yield f"It does not fit: {of}, the most in {name}."
    if report.changes and report.fits:
        yield "It fits with these, none of which changes the result:"
    yield from (f"  {change}" for change in report.changes)
    name, least = peak(report.fitted)
    if report.fits:
        yield f"Then it takes {least / GIB:.1f} GiB."
        return
    missing, need = (least - report.room) / GIB, (least + RESERVE) / GIB
    fitting = [card for card in sorted(CARDS.values(), key=lambda card: card.memory) if card.memory >= need]
    nearest = f"{math.ceil(need)} GB" + (f", such as the {fitting[0].name}" if fitting else "")
    yield f"It does not fit even at its smallest: {missing:.1f} GiB are missing in {name}. A card that fits: {nearest}."
    yield f"What else takes less, at other results: {others_that_take_less(report.config)}."


def _time_lines(report: Report) -> Iterator[str]:
    if report.card is None or not report.fits:
        return
    took = report.seconds(report.fitted)
    whole = sum(took[name] for name in ITERATION)
    parts = ", ".join(f"{name} {took[name]:.0f}" for name in ITERATION)
    hours, name = report.hours(report.fitted), report.card.name
    yield f"On a card like the {name} an iteration takes about {whole:.0f} s ({parts})."
    yield f"A run of {report.config.iterations} takes {hours:.1f} hours with evaluations; the reward's comes on top."
    yield (
        f"Assumed: {SHARE:.0%} of its arithmetic, {BANDWIDTH:.0%} of its bandwidth, {BUS:.0%} of its bus,"
        f" {START * 1e6:.0f} microseconds to start an operation."
    )
