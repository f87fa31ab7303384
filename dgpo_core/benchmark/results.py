"""The races side by side: as a table, as a picture, as a file."""

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from dgpo_core.benchmark.methods import METHODS
from dgpo_core.benchmark.race import QUICKSTART, Cost, Point, Race
from dgpo_core.common.errors import UserError
from dgpo_core.common.files import write_atomic
from dgpo_core.common.reading import parse_json, read_bytes, shown

MARKS = (0.80, 0.90, 0.95)
"""The successes that the cost is told up to."""


def as_json(races: Sequence[Race]) -> list[dict[str, Any]]:
    """As a file holds them."""
    return [asdict(race) for race in races]


def read(path: Path, known: Callable[[str], object] = METHODS.__getitem__) -> list[Race]:
    """The races of a file that `--json` wrote. Raises UserError for any other file. known: raises for a name that is
    none of a method."""
    text = read_bytes(path, "The file of races").decode("utf-8", "replace")
    try:
        return [_race(record, known) for record in parse_json(text, shown(path))]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{shown(path)} does not hold races as --json writes them.") from error


def _race(record: Mapping[str, Any], known: Callable[[str], object]) -> Race:
    points = [Point(**{**point, "cost": Cost(**point["cost"])}) for point in record["points"]]
    known(record["method"])
    return Race(**{**record, "points": tuple(points)})


def title(race: Race) -> str:
    """What a race's line is called: the method, and its group size and task where these are not the usual ones."""
    size = "" if race.group_size == 16 else f", groups of {race.group_size}"
    task = "" if race.preset == QUICKSTART else f", {race.preset}"
    return METHODS[race.method].what + size + task


def table(races: Sequence[Race]) -> str:
    """Markdown: a line for each race, with CPU seconds and thousands of passes up to each success, and the best."""
    heads = ["method", "lr", "seed", *(f"to {mark:.2f}" for mark in MARKS), "best seen", "cost of all"]
    rows = [[title(r), f"{r.lr:g}", str(r.seed), *(_cost(r.first(m)) for m in MARKS)] for r in races]
    ends = [[f"{race.best:.3f}", _cost(race.points[-1].cost)] for race in races]
    return markdown(heads, [[*row, *end] for row, end in zip(rows, ends, strict=True)])


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *rows])


def followed(races: Iterable[Race], name: Callable[[Race], str], file: Path | None) -> list[Race]:
    """The races as they end, each point told and, where there is a file, kept, as it comes."""
    done: list[Race] = []
    for race in races:
        more = done and len(race.points) > 1  # the same run with one more point
        done = [*(done[:-1] if more else done), race]
        point = race.points[-1]
        print(
            f"{name(race)}, seed {race.seed}: {point.success:.3f} after {point.iteration} iterations,"
            f" {point.cost.seconds:.1f} CPU seconds, {point.cost.passes} passes",
            flush=True,
        )
        if file:
            write_atomic(file, json.dumps(as_json(done), indent=1) + "\n")
    return done


def _cost(cost: Cost | None) -> str:
    return "-" if cost is None else f"{cost.seconds:.0f} s, {cost.passes / 1000:.0f} k"


def plot(races: Sequence[Race]) -> bytes:
    """A PNG: success over CPU seconds and over passes; the mean of a method's seeds, and a band from worst to best."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=90, layout="tight")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)

    def line(race: Race) -> tuple[str, float]:
        return title(race), race.lr

    lines = [(key, list(of)) for key, of in groupby(sorted(races, key=line), key=line)]
    for axes, what in zip(panels, ("seconds", "passes"), strict=True):
        for (name, lr), of in lines:
            x, y = _means(of, what)
            label = f"{name}, lr {lr:g}" + (f" ({len(of)} seeds)" if len(of) > 1 else "")
            (drawn,) = axes.plot(x, [sum(row) / len(row) for row in y], label=label, linewidth=1.4)
            axes.fill_between(x, [min(row) for row in y], [max(row) for row in y], alpha=0.15, color=drawn.get_color())
        axes.set_xlabel({"seconds": "CPU seconds, one thread", "passes": "samples forward and back"}[what])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out success")
    panels[1].legend(fontsize=8, loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _means(races: Sequence[Race], what: str) -> tuple[list[float], list[list[float]]]:
    """Costs up to the shortest race's end, and at each the success of every race, between its points."""
    import numpy as np

    curves = [([getattr(p.cost, what) for p in race.points], [p.success for p in race.points]) for race in races]
    x = np.linspace(0, min(cost[-1] for cost, _ in curves), 100)
    y = [np.interp(x, cost, success) for cost, success in curves]
    return x.tolist(), np.stack(y, axis=1).tolist()
