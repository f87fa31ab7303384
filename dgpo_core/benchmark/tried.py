"""`python -m dgpo_core.benchmark.tried`: what makes DGPO learn from less, and what does not, on the embedded models.

Each variant of the quickstart, or of the other `--preset`, is run until it is good enough; told is how many samples
went through the network and back until then. Variants are joined by "+": `--variants lr_2e-3 groups_of_8+lr_2e-3`.
"""

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch

from dgpo_core.benchmark import results
from dgpo_core.benchmark.race import QUICKSTART, Contest, Point, Race
from dgpo_core.benchmark.variants import VARIANTS, laid_over, variant
from dgpo_core.settings.command_line import command, parse
from dgpo_core.settings.config import Config, Count, CountOrZero
from dgpo_core.settings.presets import load_preset


@dataclass(frozen=True)
class TriedConfig:
    """Which variants, and how long."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    """Names, or several joined by "+"."""
    preset: Literal["quickstart", "quickstart-edits"] = "quickstart"
    """What they are laid over."""
    seeds: tuple[CountOrZero, ...] = (0,)
    """One run for each."""
    passes: Count = 80
    """A run ends once so many samples, in thousands, went through the network and back."""
    every: Count = 4
    """Thousands of passes between two evaluations, at least."""
    stop: float = 0.95
    """A run ends once its success is this, 0 to 1."""
    images: Count = 200
    """Images of an evaluation."""
    load: tuple[Path, ...] = ()
    """Files of earlier calls, whose runs are in the table, too."""
    json: Path | None = None
    """Write the runs to this file, after each evaluation."""


def races(options: TriedConfig) -> Iterator[Race]:
    """Every run, point by point. Raises UserError for a name that is none."""
    chosen = [(name, variant(name)) for name in options.variants]
    preset = load_preset(options.preset, Config())

    def due(iterations: int, passes: int) -> bool:
        return passes >= options.every * 1000

    def over(point: Point) -> bool:
        return point.success >= options.stop or options.passes * 1000 <= point.cost.passes

    for name, one in chosen:
        for seed in options.seeds:
            config = laid_over(one, preset, seed)
            yield from Contest(name, config, options.images, one.entrant).run(1_000_000, due, over)


def table(done: Sequence[Race]) -> str:
    """Markdown: a line for each variant of a preset, with the thousands of passes up to each success, seed by seed."""

    def line(race: Race) -> tuple[str, str]:
        return race.preset, race.method

    heads = ["variant", "seeds", *(f"to {mark:.2f}" for mark in results.MARKS), "mean to 0.95", "best seen", "ran to"]
    lines = []
    for (preset, name), of in groupby(sorted(done, key=lambda race: (*line(race), race.seed)), key=line):
        runs = list(of)
        costs = [[run.first(mark) for run in runs] for mark in results.MARKS]
        cells = [", ".join("-" if c is None else f"{c.passes / 1000:.0f}" for c in row) for row in costs]
        ends = [cost.passes / 1000 for cost in costs[-1] if cost]
        mean = f"{statistics.mean(ends):.0f}" if len(ends) == len(runs) else "-"
        best = ", ".join(f"{run.best:.3f}" for run in runs)
        ran = ", ".join(f"{run.points[-1].cost.passes / 1000:.0f}" for run in runs)
        what = variant(name).what + ("" if preset == QUICKSTART else f", {preset}")
        lines.append([what, ", ".join(str(run.seed) for run in runs), *cells, mean, best, ran])
    return results.markdown(heads, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command(lambda: parse(TriedConfig, argv, "python -m dgpo_core.benchmark.tried", __doc__), _try)


def _try(options: TriedConfig) -> None:
    torch.set_num_threads(1)
    loaded = [race for path in options.load for race in results.read(path, variant)]
    done = results.followed(races(options), lambda race: race.method, options.json)
    print(table([*loaded, *done]))


if __name__ == "__main__":
    sys.exit(main())
