"""`python -m dgpo_core.benchmark.compare`: DGPO beside other methods, on the embedded model.

All have the same model, LoRA, prompts, reward, roll-out budget, optimiser and evaluation; each its own paper's clip, KL
and noise. Told is the share of held-out images that are right, over CPU seconds of one thread (drawing, reward,
update; evaluations left out) and over the samples that went through the network and back, which are counted.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from dgpo_core.benchmark import results
from dgpo_core.benchmark.methods import METHODS
from dgpo_core.benchmark.race import Contest, Point, Race
from dgpo_core.common.errors import UserError
from dgpo_core.common.files import write_atomic
from dgpo_core.common.suggest import suggest
from dgpo_core.settings.command_line import command, parse
from dgpo_core.settings.config import Config, Count, CountOrZero
from dgpo_core.settings.presets import load_preset


@dataclass(frozen=True)
class CompareConfig:
    """Which methods, and how long."""

    preset: Literal["quickstart", "quickstart-edits"] = "quickstart"
    """The task: the shapes world, whose base is right in 0.45 of the images; or its edits, in 0.15."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Of dgpo, nft, awm, v_grpo, flow_awr, flow_grpo_fast, flow_grpo."""
    seeds: tuple[CountOrZero, ...] = (0,)
    """One run for each."""
    lr: tuple[float, ...] = ()
    """Learning rates, one run for each; without: one that was quick in the tuning, each method's own."""
    group_size: Count = 16
    """Images per group, at least 2."""
    iterations: CountOrZero = 60
    """Iterations of a run at most; 0 only draws what --load holds."""
    every: Count = 4
    """Iterations between two evaluations."""
    stop: float = 1.0
    """A run ends once its success is this, 0 to 1."""
    passes: CountOrZero = 0
    """A run ends once so many samples, in thousands, went through the network and back; 0: never."""
    images: Count = 200
    """Images of an evaluation."""
    load: tuple[Path, ...] = ()
    """Files of earlier calls, whose runs are in the table and the picture, too."""
    json: Path | None = None
    """Write the runs to this file, after each evaluation."""
    plot: Path | None = None
    """Write a picture to this file."""


def races(options: CompareConfig) -> Iterator[Race]:
    """Every run, point by point. Raises UserError for options that cannot work."""
    for name in options.methods:
        if name not in METHODS:
            raise UserError(f"There is no method {name!r}{suggest(name, METHODS)}")
    if options.group_size < 2:
        raise UserError(f"--group_size is {options.group_size} but must be at least 2.")
    preset = load_preset(options.preset, Config())

    def over(point: Point) -> bool:
        return point.success >= options.stop or 0 < options.passes * 1000 <= point.cost.passes

    def due(iterations: int, passes: int) -> bool:
        return iterations >= options.every

    for method in options.methods if options.iterations else ():
        for lr in options.lr or (METHODS[method].lr,):
            for seed in options.seeds:
                training = replace(preset.training, lr=lr)
                rollout = replace(preset.rollout, group_size=options.group_size)
                config = replace(preset, seed=seed, training=training, rollout=rollout)
                yield from Contest(method, config, options.images).run(options.iterations, due, over)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command(lambda: parse(CompareConfig, argv, "python -m dgpo_core.benchmark.compare", __doc__), _compare)


def _compare(options: CompareConfig) -> None:
    torch.set_num_threads(1)
    loaded = [race for path in options.load for race in results.read(path)]
    done = results.followed(races(options), lambda race: f"{results.title(race)}, lr {race.lr:g}", options.json)
    every = [*loaded, *done]
    if not every:
        raise UserError("There is nothing to compare: name files with --load, or give --iterations.")
    print(results.table(every))
    if options.plot:
        write_atomic(options.plot, results.plot(every))


if __name__ == "__main__":
    sys.exit(main())
