"""`python -m dgpo_core.bench`: what an iteration costs, and how much of that cannot be avoided.

"ratio" is the time of a training iteration over the time of the forwards and backwards that the algorithm asks for,
timed alone in the same process: solver steps, decoding, reference, old policy, and the trained forward and backward.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from dgpo_core import assemble
from dgpo_core.cli import parse
from dgpo_core.config import Config, Range
from dgpo_core.config_io import load_preset
from dgpo_core.distributed import World
from dgpo_core.errors import UserError
from dgpo_core.files import write_atomic
from dgpo_core.policy import Cond, Policy
from dgpo_core.trainer import Trainer


@dataclass(frozen=True)
class BenchConfig:
    """What to time."""

    json: Path | None = None
    """Write the numbers to this file."""
    preset: str = "quickstart"
    """The preset whose settings are timed."""
    model: str = ""
    """Another model than the preset's: a diffusers folder or a single .safetensors checkpoint."""
    iterations: Annotated[int, Range(1)] = 5
    """Iterations that are timed, after one that is not; medians are printed."""
    scaling: bool = True
    """Also time half as many samples per group, and half as many groups."""
    device: str = "auto"
    """Where to run: cpu, cuda, cuda:1, mps; 'auto' takes the first accelerator there is."""


class Bench:
    """One loaded model, timed under several settings."""

    def __init__(self, options: BenchConfig) -> None:
        config = load_preset(options.preset, Config())
        model = replace(config.model, path=options.model or config.model.path, device=options.device)
        # the rewards of a preset may need files that are not here: the statistics of a picture cost next to nothing
        self.config = replace(config, model=model)
        self.options = options
        self.world = World(options.device)
        self.prompts = assemble.training_prompts(self.config)
        self.rewards = assemble.training_rewards(self.config, self.world)
        self.policy, self.size = assemble.load_model(self.config, self.world)

    def sync(self) -> None:
        """Wait for the accelerator."""
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds of one call."""
        self.sync()
        start = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - start

    def run(self) -> dict[str, Any]:
        """All numbers."""
        shape = self.config.rollout.group_size, self.config.data.groups_per_iteration
        result = self.iterations(*shape)
        if self.options.scaling:
            G, P = shape
            whole = result["seconds_per_iteration"]
            half_size = self.iterations(G // 2, P)["seconds_per_iteration"]
            half_groups = self.iterations(G, max(1, P // 2))["seconds_per_iteration"]
            # 1 is exactly linear: half the samples in half the time
            result["linearity"] = {
                "group_size": whole / half_size / (G / (G // 2)),
                "groups": whole / half_groups / (P / max(1, P // 2)),
            }
        return result

    def iterations(self, G: int, P: int) -> dict[str, Any]:
        """Time iterations of P groups of G samples, each next to its bare forwards and backwards."""
        rollout, data = replace(self.config.rollout, group_size=G), replace(self.config.data, groups_per_iteration=P)
        config = replace(self.config, rollout=rollout, data=data)
        trainer = Trainer(self.policy, self.prompts, self.rewards, config, size=self.size, world=self.world)
        bare = Bare(trainer, self.sync)
        trainer.iterate()  # the first one warms up, and has no old policy to compare with
        bare.run()
        whole, least, phases = [], [], []
        for _ in range(self.options.iterations):
            done = None

            def work() -> None:
                nonlocal done
                done = trainer.iterate()

            whole.append(self.timed(work))
            least.append(self.timed(bare.run))
            phases.append(done.seconds)
        seconds = statistics.median(whole)
        return {
            "groups": P,
            "group_size": G,
            "seconds_per_iteration": seconds,
            "samples_per_second": P * G / seconds,
            "phases": {name: statistics.median(p[name] for p in phases) for name in phases[0]},
            "unavoidable_seconds": statistics.median(least),
            "ratio": statistics.median(a / b for a, b in zip(whole, least, strict=True)),
            "peak_memory_gib": peak_memory(self.policy),
        }


class Bare:
    """The forwards and backwards of one iteration, on random input, and nothing else."""

    def __init__(self, trainer: Trainer, sync: Callable[[], None]) -> None:
        config, self.policy, self.solver = trainer.config, trainer.policy, trainer.solver
        self.settings, self.cfg = config.training, config.rollout.cfg
        self.samples = config.rollout.group_size * config.data.groups_per_iteration
        self.rollout_batch = min(config.rollout.batch or self.samples, self.samples)
        self.micro_batch = min(config.training.micro_batch, self.samples)
        (cond,) = self.policy.encode([trainer.stream.prompts[0].text])
        self.cond = cond
        self.shape = self.policy.latent_shape(*trainer.size)

    def run(self) -> None:
        """Draw, decode, and train on `samples` samples."""
        for size in sizes(self.samples, self.rollout_batch):
            self.draw(size)
        # whole groups go together where they fit
        for size in sizes(self.samples * self.settings.timesteps, self.micro_batch):
            self.train(size)

    def inputs(self, size: int) -> tuple[torch.Tensor, torch.Tensor, Cond]:
        """x_t, t and cond of `size` rows."""
        x = torch.randn(size, *self.shape, device=self.policy.device)
        return x, torch.full((size,), 500.0, device=x.device), self.cond.expand(size)

    @torch.no_grad()
    def draw(self, size: int) -> None:
        """The solver's forwards, and the decoder's."""
        x, t, cond = self.inputs(size * (2 if self.cfg > 1 else 1))
        with self.policy.using("current"):
            for _ in range(self.solver.calls):
                self.policy.predict(x, t, cond)
        self.policy.decode(x[:size])

    def train(self, size: int) -> None:
        """Reference, old policy, and forward and backward of the current one."""
        x, t, cond = self.inputs(size)
        compared = [None] if self.settings.reference == "frozen" else []
        compared += ["old"] if self.settings.clip > 0 or self.settings.reference == "old" else []
        with torch.no_grad():
            for adapter in compared:
                with self.policy.using(adapter):
                    self.policy.predict(x, t, cond)
        with self.policy.using("current"):
            self.policy.predict(x, t, cond).square().mean().backward()


def sizes(total: int, batch: int) -> list[int]:
    """`total` cut into batches."""
    return [min(batch, total - done) for done in range(0, total, batch)]


def peak_memory(policy: Policy) -> float:
    """GiB: of the accelerator where there is one, else of the process."""
    if policy.device.type == "cuda":
        return torch.cuda.max_memory_allocated(policy.device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    try:
        options = parse(BenchConfig, argv, "python -m dgpo_core.bench", __doc__)
        result = Bench(options).run()
        print(json.dumps(result, indent=2))
        if options.json:
            write_atomic(options.json, json.dumps(result, indent=2) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
