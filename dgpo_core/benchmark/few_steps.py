"""`python -m dgpo_core.benchmark.few_steps`: ways to train a model of few steps, on the embedded one made so.

Told is, at the model's own few steps, before and after each run: the share of held-out images that are right, the edge
density, and the sharpness, which is the mean gradient of the brightness on the pixels of an edge and, unlike the
density, does not grow with what is in the picture; and the variety, how far the images of one prompt are apart.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgpo_core.benchmark.results import markdown
from dgpo_core.common.distributed import World
from dgpo_core.common.errors import UserError
from dgpo_core.common.files import write_atomic
from dgpo_core.common.group import Group
from dgpo_core.common.suggest import suggest
from dgpo_core.evaluation.held_out import HeldOut
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy.base import AdapterName
from dgpo_core.rewards import make_reward
from dgpo_core.rewards.statistics import luma
from dgpo_core.runs import assemble
from dgpo_core.settings.command_line import command, parse
from dgpo_core.settings.config import EMBEDDED, Config, Count, CountOrZero
from dgpo_core.settings.presets import load_preset
from dgpo_core.settings.values import from_dict

STEPS = 2
"""What the embedded few-step LoRA was made for."""
EDGE = 0.1
"""Change of brightness per pixel from which a pixel is one of an edge, as in the reward edge_density."""

_BOTH, _FIRST = {"timesteps": 2, "t_min": 2}, {"timesteps": 1, "t_min": 1}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"training": _BOTH},
    "first_step": {"training": _FIRST},
    "kl_0.1": {"training": {**_FIRST, "kl_weight": 0.1}},
    "guard_1": {"training": {**_BOTH, "norm_guard": 1.0}},
    "held": {
        "training": _BOTH,
        "reward": ["shapes_graded", {"name": "edge_density", "weight": -0.3}],
        "combine": "normalised",
    },
}
"""By name, the settings that differ from the quickstart's."""


@dataclass(frozen=True)
class FewStepsConfig:
    """Which ways, and how long."""

    ways: tuple[str, ...] = tuple(WAYS)
    """Settings of the training, by name."""
    seeds: tuple[CountOrZero, ...] = (0,)
    """One run for each."""
    iterations: Count = 40
    """Iterations of a run."""
    every: Count = 20
    """Iterations between two measurements."""
    images: Count = 400
    """Images of a measurement."""
    load: tuple[Path, ...] = ()
    """Files of earlier calls, whose runs are in the table, too."""
    json: Path | None = None
    """Write the runs to this file, after each measurement."""


@dataclass(frozen=True)
class Seen:
    """One measurement of a run; iteration 0 is before it."""

    way: str
    seed: int
    iteration: int
    success: float
    edge_density: float
    sharpness: float
    diversity: float


def sharpness(images: Tensor) -> Tensor:
    """Mean gradient of the brightness on pixels of an edge, 0 where there is none. [B, 3, H, W] in [0, 1] -> [B]"""
    y = luma(images)
    dx = (y[:, 1:-1, 2:] - y[:, 1:-1, :-2]) / 2
    dy = (y[:, 2:, 1:-1] - y[:, :-2, 1:-1]) / 2
    steep = (dx.square() + dy.square()).sqrt()
    edge = steep > EDGE
    return (steep * edge).sum(dim=(1, 2)) / edge.sum(dim=(1, 2)).clamp_min(1)


def settings(way: str, seed: int) -> Config:
    """The quickstart's at the model's own few steps, with the changes of this way."""
    base = load_preset("quickstart", Config())
    config = replace(
        base,
        seed=seed,
        model=replace(base.model, few_step_lora=EMBEDDED),
        rollout=replace(base.rollout, steps=STEPS),
        evaluation=replace(base.evaluation, steps=STEPS),
    )
    return from_dict(WAYS[way], config, way)


def run(way: str, seed: int, options: FewStepsConfig) -> Iterator[Seen]:
    """One run, measured before, every so often, and after."""
    config, world = settings(way, seed), World("cpu")
    policy, size = assemble.load_model(config, "cpu")
    judges = {name: make_reward(name) for name in ("shapes", "edge_density", "group_diversity")}
    held_out = HeldOut.of(config, policy, assemble.held_out_prompts(config), judges, size, world)
    rewards = assemble.training_rewards(config, "cpu")
    trainer = Trainer(policy, assemble.training_prompts(config), rewards, config, size=size)

    def measured(adapter: AdapterName | None) -> Seen:
        sharp: list[Tensor] = []

        def see(_: int, group: Group) -> None:
            sharp.append(sharpness(group.images))

        found = held_out.score(adapter, options.images, see=see)
        means = [found.total({name: 1.0}).mean().item() for name in judges]
        success, edges, diversity = means
        return Seen(way, seed, trainer.iteration, success, edges, torch.cat(sharp).mean().item(), diversity)

    yield measured(None)
    while trainer.iteration < options.iterations:
        trainer.iterate()
        if trainer.iteration % options.every == 0 or trainer.iteration == options.iterations:
            yield measured(config.evaluation.weights)


def table(seen: Sequence[Seen]) -> str:
    """A line for each measurement after a start: changes of edge density and sharpness are relative to it."""
    starts = {(one.way, one.seed): one for one in seen if one.iteration == 0}
    names = ("way", "seed", "iterations", "success", "edge density", "sharpness", "variety")
    rows = []
    for one in sorted(seen, key=lambda one: (list(WAYS).index(one.way), one.seed, one.iteration)):
        start = starts[one.way, one.seed]
        if one is start:
            continue
        measured = [(getattr(start, name), getattr(one, name)) for name in ("edge_density", "sharpness", "diversity")]
        cells = [one.way, str(one.seed), str(one.iteration), f"{start.success:.3f} to {one.success:.3f}"]
        rows.append([*cells, *(f"{a:.4f} to {b:.4f} ({b / a - 1:+.1%})" for a, b in measured)])
    return markdown(names, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command(lambda: parse(FewStepsConfig, argv, "python -m dgpo_core.benchmark.few_steps", __doc__), _measure)


def _measure(options: FewStepsConfig) -> None:
    for way in options.ways:
        if way not in WAYS:
            raise UserError(f"There is no way {way!r}{suggest(way, WAYS)}")
    torch.set_num_threads(1)
    seen = [Seen(**entry) for path in options.load for entry in json.loads(path.read_text("utf-8"))]
    for way in options.ways:
        for seed in options.seeds:
            for one in run(way, seed, options):
                seen.append(one)
                print(one, flush=True)
                if options.json:
                    write_atomic(options.json, json.dumps([asdict(entry) for entry in seen], indent=1) + "\n")
    print(table(seen))


if __name__ == "__main__":
    sys.exit(main())
