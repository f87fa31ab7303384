"""`python -m dgpo_core.benchmark.held_back`: what a reward that can be exploited does to the embedded model, and what
holds it back.

Trained are the honest reward (`shapes_graded`) and beside it one that any picture can have more of, such as brightness
or saturation: freely, with guards of the norm, and with targets of the distance to the base. Told is how far the
second has gone where the first has gained as much.
"""

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dgpo_core.benchmark.results import markdown
from dgpo_core.benchmark.variants import laid_over, variant
from dgpo_core.common.files import write_atomic
from dgpo_core.method.trainer import Trainer
from dgpo_core.runs import assemble
from dgpo_core.settings.command_line import command, parse
from dgpo_core.settings.config import Config, Count, CountOrZero, NotNegative, RewardTerm
from dgpo_core.settings.presets import load_preset

HONEST, SPAN = "shapes_graded", 5  # the mean of so many iterations is one point
GAINS = (0.05, 0.10, 0.15)
"""Gains of the honest reward at which the other one is told."""


@dataclass(frozen=True)
class HeldBackConfig:
    """Which reward is exploited, and what is held against it."""

    hack: str = "saturation"
    """The reward that is exploited: brightness, saturation or another of the statistics."""
    weight: NotNegative = 5.0
    """Its weight beside that of shapes_graded, 1."""
    norm_guard: tuple[NotNegative, ...] = (0.1, 1.0)
    """Guards, one run for each."""
    kl_target: tuple[NotNegative, ...] = ()
    """Targets, one run for each."""
    variant: str = "groups_of_8+timesteps_2+lr_2e-3"
    """What else is not as in the quickstart, as `tried` has it."""
    iterations: Count = 40
    """Iterations of a run."""
    seed: CountOrZero = 0
    """Seed of all runs."""
    json: Path | None = None
    """Write the runs to this file, after each iteration."""


@dataclass(frozen=True)
class Held:
    """A run: of each iteration the mean honest and exploited reward, the norm relative to the base's, the distance."""

    label: str
    honest: tuple[float, ...] = ()
    hacked: tuple[float, ...] = ()
    norm: tuple[float, ...] = ()
    kl: tuple[float, ...] = ()

    def moved(self, gain: float) -> float | None:
        """How far the exploited reward had gone where the honest one had gained so much; None: it never had."""
        honest, hacked = smooth(self.honest), smooth(self.hacked)
        return next((b - hacked[0] for a, b in zip(honest, hacked, strict=True) if a - honest[0] >= gain), None)


def smooth(values: Sequence[float]) -> list[float]:
    """Means of `SPAN` iterations each, one for every iteration from the first that has so many."""
    return [statistics.mean(values[i : i + SPAN]) for i in range(max(1, len(values) - SPAN + 1))]


def runs(options: HeldBackConfig) -> Iterator[Held]:
    """Every run, iteration by iteration. Raises UserError for rewards and variants that are none."""
    preset = laid_over(variant(options.variant), load_preset("quickstart", Config()), options.seed)
    preset = replace(preset, reward=(RewardTerm(HONEST), RewardTerm(options.hack, options.weight)))
    rows = [("free", preset.training)]
    rows += [(f"norm_guard {w:g}", replace(preset.training, norm_guard=w)) for w in options.norm_guard]
    rows += [(f"kl_target {d:g}", replace(preset.training, kl_target=d)) for d in options.kl_target]
    for label, training in rows:
        config = replace(preset, training=training)
        policy, size = assemble.load_model(config, "cpu")
        rewards = assemble.training_rewards(config, "cpu")
        trainer = Trainer(policy, assemble.training_prompts(config), rewards, config, size=size)
        held = Held(label)
        for _ in range(options.iterations):
            metrics = trainer.iterate().metrics
            held = Held(
                label,
                (*held.honest, metrics[f"reward/{HONEST}"]),
                (*held.hacked, metrics[f"reward/{options.hack}"]),
                (*held.norm, metrics["norm_ratio"]),
                (*held.kl, metrics["kl"]),
            )
            yield held


def table(done: Sequence[Held]) -> str:
    """Markdown: a line for each run, how far the exploited reward went at each gain, and where all ended."""
    heads = ["", *(f"at +{gain:.2f}" for gain in GAINS), "honest", "exploited", "norm", "distance"]
    lines = []
    for held in done:
        moved = [held.moved(gain) for gain in GAINS]
        first, last = (
            [smooth(values)[i] for values in (held.honest, held.hacked, held.norm, held.kl)] for i in (0, -1)
        )
        ends = [f"{first[i]:.3f} to {last[i]:.3f}" for i in (0, 1)]
        cells = ["-" if m is None else f"{m:+.3f}" for m in moved]
        lines.append([held.label, *cells, *ends, f"{last[2]:.3f}", f"{last[3]:.3f}"])
    return markdown(heads, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command(lambda: parse(HeldBackConfig, argv, "python -m dgpo_core.benchmark.held_back", __doc__), _hold)


def _hold(options: HeldBackConfig) -> None:
    torch.set_num_threads(1)
    done: list[Held] = []
    for held in runs(options):
        done = [*(done[:-1] if len(held.honest) > 1 else done), held]
        if options.json:
            write_atomic(options.json, json.dumps([asdict(one) for one in done], indent=1) + "\n")
        if len(held.honest) % SPAN == 0:
            print(
                f"{held.label}, iteration {len(held.honest)}: honest {smooth(held.honest)[-1]:.3f},"
                f" {options.hack} {smooth(held.hacked)[-1]:.3f}, norm {smooth(held.norm)[-1]:.3f},"
                f" distance {smooth(held.kl)[-1]:.3f}",
                flush=True,
            )
    print(table(done))


if __name__ == "__main__":
    sys.exit(main())
