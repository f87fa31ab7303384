"""What an iteration leaves behind: its groups, its numbers, its seconds."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dgpo_core.common.group import Group
from dgpo_core.settings.config import RewardTerm
from dgpo_core.settings.gates import Gate


@dataclass(frozen=True)
class Iteration:
    """What one iteration did: its groups (this process's), its numbers for the log, seconds by phase, warnings.

    taught: by the places of all processes' groups, whether their rewards differ.
    """

    groups: list[Group]
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    warnings: Sequence[str] = ()
    taught: Mapping[int, bool] = field(default_factory=dict)

    def without(self, skipped: Sequence[str]) -> "Iteration":
        """The same, with a count and a warning of groups that were left out, one problem for each."""
        warning = f"{len(skipped)} group(s) left out: {skipped[0].removesuffix('.')}"
        return replace(self, metrics={**self.metrics, "skipped": len(skipped)}, warnings=[*self.warnings, warning])


@dataclass
class Stopwatch:
    """Seconds by phase, the accelerator's queue included."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds what passes inside to the seconds of `name`."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def reward_metrics(scores: Sequence[Mapping[str, Tensor]], term: RewardTerm) -> dict[str, float]:
    """Of one reward over groups' raw scores: mean, mean deviation within a group, share of samples it is gated for."""
    rows = [group[term.name] for group in scores]
    metrics = {
        f"reward/{term.name}": torch.cat(rows).mean().item(),
        f"reward_std/{term.name}": torch.stack([row.std(correction=0) for row in rows]).mean().item(),
    }
    if term.only_if:
        gate = Gate.of(term.only_if, term.name)
        passed = gate.passed(torch.cat([group[gate.reward] for group in scores]))
        metrics[f"gated/{term.name}"] = 1 - passed.float().mean().item()
    return metrics
