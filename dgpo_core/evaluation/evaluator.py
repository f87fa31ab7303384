"""The evaluations of a training: held-out prompts and the same seeds each time, in-domain and watched side by side."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.pictures import grid, png
from dgpo_core.common.prompts import Prompt, digest_of_prompts
from dgpo_core.evaluation import alarm
from dgpo_core.evaluation.alarm import Alarm
from dgpo_core.evaluation.held_out import HeldOut, evaluation_set
from dgpo_core.evaluation.scores import (
    Evaluation,
    Gain,
    Measurement,
    evaluation_weights,
    total,
    trained_weights,
    watched,
)
from dgpo_core.policy import AdapterName
from dgpo_core.settings.config import Config

SAMPLE_PROMPTS, SAMPLES_EACH = 6, 6  # rows and columns of the pictures in samples/


@dataclass(frozen=True)
class Watch:
    """Which scores say what. Weights by reward.

    measured: what the gain is told by; in_domain: what is trained; names: what is scored and never trained on; trained:
    as in_domain, but none where people are the reward.
    """

    measured: Mapping[str, float]
    in_domain: Mapping[str, float]
    names: Sequence[str]
    trained: Mapping[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What is trained, in a word."""
        return "+".join(self.in_domain)

    @staticmethod
    def of(config: Config, judges: Collection[str]) -> "Watch":
        """What the settings ask for. A trained reward that `judges` lack (a person) has the measured one stand in."""
        measured, trained = evaluation_weights(config), trained_weights(config)
        scored = trained.keys() <= set(judges)
        in_domain = trained if scored else measured
        names = [name for name in watched(config) if name not in in_domain]
        return Watch(measured, in_domain, names, trained if scored else {})

    def measure(self, evaluation: Evaluation) -> Measurement:
        """The reward that tells the gain."""
        return Measurement.of(evaluation.total(self.measured))

    def alarms(self, history: Sequence[Evaluation]) -> list[Alarm]:
        """What has gone off so far, see `alarm.alarms`."""
        return alarm.alarms(history, self.in_domain, self.names)

    def best(self, history: Sequence[Evaluation]) -> Evaluation:
        """The best evaluation so far, see `alarm.best`."""
        return alarm.best(history, self.in_domain, self.names)

    def record(self, history: Sequence[Evaluation]) -> dict[str, Any]:
        """The last evaluation as a line of metrics.jsonl: measured, in-domain, all that is watched, and the alarms.

        Of each: mean, standard error, and after the first evaluation the gain over it, image by image.
        """
        base, now = history[0], history[-1]
        held_out = self.measure(now)
        record: dict[str, Any] = {
            "iteration": now.iteration,
            "held_out": held_out.mean,
            "held_out_ci95": list(held_out.ci95),
            "n": held_out.n,
            "in_domain": _numbers(base, now, self.in_domain),
            **{f"watch/{name}": _numbers(base, now, {name: 1.0}) for name in self.names},
        }
        raised = {one.name: str(one) for one in self.alarms(history) if one.iteration == now.iteration}
        return record | ({"alarms": raised} if raised else {})


def _numbers(base: Evaluation, now: Evaluation, weights: Mapping[str, float]) -> dict[str, float]:
    values = now.total(weights)
    record = {"mean": values.mean().item(), "sem": Gain.of(values, now.places[:, 0]).sem}
    if now is base:
        return record
    gain = now.gain(base, weights)
    return record | {"gain": gain.mean, "gain_sem": gain.sem}


def side_by_side(record: Mapping[str, Any]) -> str:
    """A record in one line: in-domain, and all that is watched, each with its change since the first evaluation."""
    rows = {"in-domain": record["in_domain"]}
    rows |= {name.removeprefix("watch/"): row for name, row in record.items() if name.startswith("watch/")}
    changes = [f" ({row['gain']:+.3f})" if "gain" in row else "" for row in rows.values()]
    parts = [f"{name} {row['mean']:.3f}{change}" for (name, row), change in zip(rows.items(), changes, strict=True)]
    return f"{parts[0]} | watched: {', '.join(parts[1:])}"


def read_evaluations(folder: Path, until: int, names: Collection[str]) -> tuple[list[Evaluation], int]:
    """Those of a run's folder up to an iteration that hold the scores of all `names`, oldest first; the run goes on
    without the others, and how many these are."""
    found, lost = [], 0
    for path in folder.glob("iteration_*.safetensors"):
        try:
            evaluation = Evaluation.load(path)
        except UserError:
            lost += 1
            continue
        if evaluation.scores.keys() >= set(names):
            found.append(evaluation)
        else:
            lost += 1
    return sorted((e for e in found if e.iteration <= until), key=lambda e: e.iteration), lost


@dataclass
class Evaluator:
    """Measures a policy again and again, and remembers what it found.

    history: the evaluations so far, oldest first. since: the first iteration whose evaluations are of these held-out
    prompts; 0 unless they were changed.
    """

    held_out: HeldOut
    watch: Watch
    history: list[Evaluation] = field(default_factory=list)
    since: int = 0

    @property
    def measures(self) -> bool:
        """Whether there is anything to measure: held-out prompts, and a reward that is not a person's."""
        return bool(self.held_out.prompts and self.watch.measured)

    @cached_property
    def prompts(self) -> str:
        """What tells the held-out prompts from others."""
        return digest_of_prompts(self.held_out.prompts)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"held_out": self.prompts, "held_out_since": self.since}

    def go_on(self, info: Mapping[str, Any], folder: Path, until: int) -> int:
        """Take up a run at iteration `until`, with the evaluations in its folder; how many of these cannot be read.

        info: what `state` gave. Where that was of other prompts, nothing that was measured before can be compared.
        """
        since = info.get("held_out_since")
        self.since = since if isinstance(since, int) else 0
        if info.get("held_out", self.prompts) != self.prompts:
            self.since = until + 1
            if self.held_out.world.leads:
                self.held_out.tell(
                    "Warning: the held-out prompts are not those that the run began with: nothing is compared with what"
                    " was measured before."
                )
        found, lost = read_evaluations(folder, until, self.held_out.judges)
        self.history = [one for one in found if one.iteration >= self.since]
        return lost

    def at(self, iteration: int, adapter: AdapterName | None, images: int) -> Evaluation:
        """Draw and score `images` images of held-out prompts; not yet part of the history."""

        return self.held_out.score(adapter, images, iteration=iteration)

    def texts(self, images: int, prompts: Sequence[Prompt]) -> list[str]:
        """The prompts that this process draws in evaluations of up to `images` images and in `samples`."""
        mine = self.held_out.texts(images) if self.measures else []
        return mine + [prompt.text for prompt in _few(prompts) if self.held_out.world.leads]

    def samples(self, iteration: int, adapter: AdapterName | None, prompts: Sequence[Prompt]) -> bytes:
        """The same prompts and seeds at every call, as one labelled picture, a PNG.

        Where there are no held-out prompts, the trained reward stands under the pictures: it can judge what is trained.
        """
        few = _few(prompts)
        rows = evaluation_set(few, SAMPLES_EACH * len(few))
        weights = self.watch.measured if self.held_out.prompts else self.watch.trained
        groups = self.held_out.draw(adapter, rows)
        judges = {name: self.held_out.judges[name] for name in weights}
        scored = replace(self.held_out, judges=judges).judged(groups)
        good = [group for group in scored if isinstance(group, Group)]
        scores = [total(group, weights) for group in good] if weights and len(good) == len(groups) else None
        return png(grid(groups, f"iteration {iteration}", scores))


def _few(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    return prompts[:: max(1, len(prompts) // SAMPLE_PROMPTS)][:SAMPLE_PROMPTS]
