"""What a person has said in the course of a training, in a sentence and as a curve.

The mean of a person's scores is zero, whatever they are about. What says something: how many groups were told apart,
and how often the newest pictures were put before one that the untrained model had drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from dgpo_core.common.pictures import TICKS, drawn

NEWEST = 5
"""Rounds that "the newest pictures" are of."""

Records = Sequence[Mapping[str, Any]]


def said(records: Records) -> str:
    """Such as "12 groups ranked, the newest pictures win 71 % against the first"; "" where nobody was asked.

    records: one a round; of a person's, `asked` groups and how many of them were `ranked`, and `wins` of `against`
    comparisons with the untrained model's pictures (a tie is half a win).
    """
    asked, ranked = (sum(record.get(key, 0) for record in records) for key in ("asked", "ranked"))
    if not asked:
        return ""
    parts = [
        f"{ranked} group{'' if ranked == 1 else 's'} ranked",
        *([f"{asked - ranked} skipped"] if asked > ranked else []),
    ]
    compared = [record for record in records if record.get("against")]
    if compared:
        parts.append(f"the newest pictures win {100 * _share(compared[-NEWEST:]):.0f} % against the first")
    return ", ".join(parts)


def curve(records: Records) -> Image.Image | None:
    """A picture of how often each round's pictures win against the first; without comparisons, of how many groups were
    ranked. None where nobody was asked."""
    if not said(records):
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.2), dpi=110)
    axes = figure.add_axes((0.11, 0.12, 0.86, 0.79))
    compared = [record for record in records if record.get("against")]
    if compared:
        rounds, shares = [r["iteration"] for r in compared], [100 * _share([r]) for r in compared]
        bars = [196 * math.sqrt(_share([r]) * (1 - _share([r])) / r["against"]) for r in compared]
        axes.errorbar(
            rounds, shares, bars, color="tab:blue", alpha=0.5, marker="o", markersize=4, capsize=3, linewidth=0
        )
        smooth = [100 * _share(compared[max(0, i + 1 - NEWEST) : i + 1]) for i in range(len(compared))]
        axes.plot(rounds, smooth, color="tab:blue", label=f"the newest {NEWEST} rounds")
        axes.axhline(50, color="gray", linestyle="--", linewidth=0.8)
        axes.set_ylim(0, 100)
        axes.set_ylabel("% of wins against the untrained model")
        axes.legend(loc="lower right", fontsize=9)
    else:
        total, ranked = 0, []
        for record in records:
            total += record.get("ranked", 0)
            ranked.append(total)
        axes.plot([r["iteration"] for r in records], ranked, color="tab:blue", marker="o", markersize=4)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("groups ranked")
    axes.set_title(said(records), fontsize=10)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(TICKS, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(TICKS, integer=True))
    axes.grid(alpha=0.3)
    return drawn(figure)


def _share(records: Records) -> float:
    return sum(record["wins"] for record in records) / sum(record["against"] for record in records)
