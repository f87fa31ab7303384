"""What `dgpo_core.evaluate` found, for people: a table, a Markdown report and a picture."""

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgpo_core.common.group import Group
from dgpo_core.common.pictures import comparison, png
from dgpo_core.common.reading import shown
from dgpo_core.evaluation.by_tag import ByTag
from dgpo_core.evaluation.scores import Evaluation, Gain, Measurement, total
from dgpo_core.settings.config import EMBEDDED, Config
from dgpo_core.settings.shipped import EDITOR, EDITS


@dataclass(frozen=True)
class Column:
    """A reward, or a weighted sum of rewards, that is measured."""

    name: str
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One model under one reward. gain: over the base, image by image; None of the base itself."""

    label: str
    column: str
    measured: Measurement
    gain: Gain | None

    def cells(self) -> list[str]:
        """Mean, 95 % interval, gain, 95 % interval of the gain."""
        mean = [f"{self.measured.mean:.3f}", _interval(self.measured.ci95, "")]
        return [*mean, f"{self.gain.mean:+.3f}", _interval(self.gain.ci95, "+")] if self.gain else [*mean, "", ""]


@dataclass(frozen=True)
class Table:
    """All models under all rewards. rows: evaluations by label, the base's first. tags: of each prompt, or none."""

    columns: Sequence[Column]
    rows: Mapping[str, Evaluation]
    tags: Sequence[str] = ()

    def of(self, column: Column) -> Iterator[Row]:
        """The models under one reward, the base first."""
        base = next(iter(self.rows.values()))
        for label, evaluation in self.rows.items():
            gain = None if evaluation is base else evaluation.gain(base, column.weights)
            yield Row(label, column.name, Measurement.of(evaluation.total(column.weights)), gain)

    def by_tag(self, column: Column) -> ByTag:
        """The models under one reward, by kind of prompt."""
        return ByTag.of(self.rows, column.weights, self.tags)

    def as_json(self) -> list[dict[str, Any]]:
        """One entry per model and reward, in this order."""
        return [
            {"model": row.label, "reward": row.column, **row.measured.as_json(), **_gain_json(row.gain)}
            | tagged.as_json(row.label)
            for column in self.columns
            for tagged in [self.by_tag(column)]
            for row in self.of(column)
        ]

    def __str__(self) -> str:
        """One block per reward, and one by tag where the prompts have any, their columns in line."""
        width = max(map(len, self.rows))
        head = f"{'':{width}}  {'mean':>7}  {'95 % interval':^18}  {'gain':>7}  {'95 % interval':^18}".rstrip()
        blocks = []
        for column in self.columns:
            rows = [
                f"{r.label:{width}}  {a:>7}  {b:^18}  {c:>7}  {d:^18}".rstrip()
                for r in self.of(column)
                for a, b, c, d in [r.cells()]
            ]
            blocks.append("\n".join([shown(column.name), head, *rows]))
            if cells := self.by_tag(column).cells(shown):
                wide = [max(7, len(name)) for name in cells[0][1:]]
                lines = [[f"{label:{width}}", *map(str.rjust, line, wide)] for label, *line in cells]
                blocks.append("\n".join(map("  ".join, lines)))
        return "\n\n".join(blocks)


def _interval(bounds: tuple[float, float], sign: str) -> str:
    low, high = bounds
    return f"{low:{sign}.3f} to {high:{sign}.3f}"


def _gain_json(gain: Gain | None) -> dict[str, Any]:
    return {"gain": gain.mean, "gain_ci95": list(gain.ci95)} if gain else {}


def escaped(text: str) -> str:
    """A text from outside as Markdown that shows it and does nothing: no HTML, link, picture or cell of a table."""
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
    return "".join(entities.get(c) or (f"\\{c}" if c in _MARKS else c) for c in shown(text))


_MARKS = set(string.punctuation) - set("-,;/'")


def markdown(table: Table, config: Config) -> str:
    """report.md: what was measured and how, a table per reward, and the picture beside it."""
    e, n = config.evaluation, len(next(iter(table.rows.values())))
    held_out = "" if config.data.held_out_text else config.data.held_out
    held_out = held_out or "the prompts in the settings"
    prompts = {EMBEDDED: "the embedded held-out prompts", EDITS: "the embedded held-out edits"}.get(held_out)
    base = {EMBEDDED: "the embedded model", EDITOR: "the embedded editor"}.get(config.model.path)
    lines = [
        "# Adapters against their base",
        "",
        f"{n} images each of {prompts or escaped(held_out)}, drawn by {base or escaped(config.model.path)} from the"
        " same seeds with"
        f" {escaped(e.solver or config.rollout.solver)}, {e.steps} steps, guidance {e.cfg:g}."
        " A gain is the mean difference to the base, image by image.",
    ]
    head = ["| | mean | 95 % interval | gain | 95 % interval |", "| --- " * 5 + "|"]
    for column in table.columns:
        lines += ["", f"## {escaped(column.name)}", "", *head]
        lines += [f"| {escaped(row.label)} | {' | '.join(row.cells())} |" for row in table.of(column)]
        if cells := table.by_tag(column).cells(escaped):
            lines += ["", *(f"| {' | '.join(line)} |" for line in (cells[0], ["---"] * len(cells[0]), *cells[1:]))]
    lines += ["", "## The same prompts and seeds", "", f"Under each picture its {escaped(table.columns[0].name)}.", ""]
    return "\n".join([*lines, "![The same prompts and seeds side by side](report.png)", ""])


def picture(table: Table, groups: Mapping[str, Sequence[Group]]) -> bytes:
    """report.png: one block per model, one row per prompt, the first reward under each image."""
    first = table.columns[0]
    heads = {row.label: f"{row.label}: {first.name} {row.measured.mean:.3f}" for row in table.of(first)}
    scores = [[total(group, first.weights) for group in column] for column in groups.values()]
    return png(comparison({heads[label]: column for label, column in groups.items()}, scores))
