"""One method at work: its success on held-out prompts over what it has cost."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from dgpo_core.benchmark.methods import METHODS, Entrant
from dgpo_core.common.distributed import World
from dgpo_core.evaluation.held_out import HeldOut
from dgpo_core.runs import assemble
from dgpo_core.settings.config import Config

QUICKSTART = "quickstart"


@dataclass(frozen=True)
class Cost:
    """What iterations cost: CPU seconds of the process, and samples that went through the network and back."""

    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0

    @property
    def passes(self) -> int:
        """Forwards and backwards."""
        return self.forwards + self.backwards

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Point:
    """The share of held-out images that are right after so many iterations, and what these cost."""

    iteration: int
    cost: Cost
    success: float


@dataclass(frozen=True)
class Race:
    """One run of a method: its points in order, the first before any training. group_size, lr, preset: as it ran."""

    method: str
    seed: int
    lr: float
    group_size: int
    points: tuple[Point, ...] = ()
    preset: str = QUICKSTART

    def first(self, success: float) -> Cost | None:
        """The cost up to the first evaluation that is at least so good."""
        return next((point.cost for point in self.points if point.success >= success), None)

    @property
    def best(self) -> float:
        """The best success seen."""
        return max(point.success for point in self.points)


class Counter:
    """Counts the samples that go forward through a network and back, from now on."""

    def __init__(self, network: nn.Module) -> None:
        self.forwards = self.backwards = 0
        network.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, given: Any, found: Any) -> None:
        out: Tensor = found[0]
        self.forwards += len(out)
        if out.requires_grad:
            out.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)

    def now(self) -> Cost:
        """Everything since the counter was made; seconds are the process's, whatever else the machine does."""
        return Cost(time.process_time(), self.forwards, self.backwards)


class Contest:
    """A fresh model with one method on it.

    config: a preset's settings under its name, with seed, learning rate and group size as this run has them. The
    averaged weights are evaluated, as the quickstart does, on `images` images of seeds that no training uses; that
    costs nothing here.
    entrant: what `method` is; without, the one that the comparison knows by this name.
    """

    def __init__(self, method: str, config: Config, images: int, entrant: Entrant | None = None) -> None:
        world = World("cpu")
        self.race = Race(method, config.seed, config.training.lr, config.rollout.group_size, preset=config.name)
        self.policy, size = assemble.load_model(config, "cpu")
        self.counter = Counter(self.policy.network)
        rewards, prompts = assemble.training_rewards(config, "cpu"), assemble.held_out_prompts(config)
        judges = assemble.evaluation_rewards(config, rewards, "cpu")
        self.held_out, self.images = HeldOut.of(config, self.policy, prompts, judges, size, world), images
        made: Entrant = entrant or METHODS[method]
        self.method = made(self.policy, assemble.training_prompts(config), rewards, config, size)
        self.weights = dict.fromkeys(judges, 1.0)

    def iterate(self) -> Cost:
        """One iteration; what it cost."""
        before = self.counter.now()
        self.method.iterate()
        return self.counter.now() - before

    def success(self) -> float:
        """Of the averaged weights as they are; 190 of 200 are 0.95, not a little less."""
        return round(self.held_out.measure("ema", self.images, self.weights).mean, 6)

    def run(self, iterations: int, due: Callable[[int, int], bool], stop: Callable[[Point], bool]) -> Iterator[Race]:
        """The race with one more point at a time: at the start, then wherever `due` says so of the iterations and of
        the passes since the last one, and at the end; until `stop` of a point."""
        cost, done = Cost(), 0
        while True:
            point = Point(done, cost, self.success())
            self.race = replace(self.race, points=(*self.race.points, point))
            yield self.race
            if done >= iterations or stop(point):
                return
            while done < iterations and not due(done - point.iteration, (cost - point.cost).passes):
                cost += self.iterate()
                done += 1
