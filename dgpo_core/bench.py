"""`python -m dgpo_core.bench`: what an iteration costs, and how much of that cannot be avoided.

"ratio" is the time of a training iteration over the time of the forwards and backwards that the algorithm asks for,
timed alone in the same process: solver steps, decoding, reference, old policy, and the trained forward and backward.

With --random, and where the preset names no prompts, those of the embedded model are taken, and a reward that looks at
no picture and gives no two the same: it needs no weights and no time, so that of a real reward comes on top.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch

from dgpo_core.benchmark import suite
from dgpo_core.benchmark.iteration import ANY, Differing, with_pictures
from dgpo_core.benchmark.presets import PRESETS
from dgpo_core.common.distributed import World
from dgpo_core.common.errors import UserError
from dgpo_core.common.files import require_writable, write_atomic
from dgpo_core.diffusion.solvers import SchedulerSolver
from dgpo_core.method.trainer import Trainer
from dgpo_core.method.update import Reference, References
from dgpo_core.policy import Cond, Policy
from dgpo_core.runs import assemble
from dgpo_core.settings.command_line import command, parse
from dgpo_core.settings.config import EMBEDDED, Config, Count, CountOrZero
from dgpo_core.settings.presets import load_preset
from dgpo_core.settings.validation import validate
from dgpo_core.settings.values import read_rewards


@dataclass(frozen=True)
class BenchConfig:
    """What to time."""

    json: Path | None = None
    """Write the numbers to this file."""
    preset: str = ""
    """The preset whose settings are timed; empty: the one of the random model, else quickstart."""
    model: str = ""
    """Another model than the preset's: a diffusers folder or a single .safetensors checkpoint."""
    random: str = ""
    """A model of real size with random weights instead: sd15, sd21, sd35m, sdxl, flux, kontext, zimage,
    qwenimage, qwen-image-edit, chroma, flux2-klein, sana, hidream, wan or wan-14b; nothing is downloaded."""
    height: CountOrZero = 0
    """Image height in pixels; 0 is the preset's."""
    width: CountOrZero = 0
    """Image width in pixels; 0 is the preset's."""
    groups: CountOrZero = 0
    """Groups per iteration; 0 is the preset's number."""
    group_size: CountOrZero = 0
    """Images per group, at least 2; 0 is the preset's number."""
    batch: CountOrZero = 0
    """Images per forward of the roll-out; 0 is the preset's."""
    micro_batch: CountOrZero = 0
    """Images per forward of the update; 0 is the preset's."""
    checkpointing: Literal["", "on", "off"] = ""
    """Recompute activations in the backward pass; empty is the preset's."""
    reward: str = ""
    """The reward, as in a training; empty: the preset's, or one without cost where the preset names no prompts."""
    dtype: Literal["", "auto", "float32", "bfloat16", "float16"] = ""
    """Number type of the frozen base; empty is the preset's."""
    quantize: Literal["", "none", "fp8", "int8", "nf4"] = ""
    """How the frozen base's large layers are kept; empty is the preset's."""
    compile: bool = False
    """torch.compile the backbone."""
    offload_blocks: bool = False
    """Keep the base's blocks in main memory and bring them to the accelerator in turn."""
    iterations: Count = 5
    """Iterations that are timed, after one that is not; medians are printed."""
    scaling: bool = True
    """Also time half as many samples per group, and half as many groups, where there are enough to halve."""
    device: str = "auto"
    """Where to run: cpu, cuda, cuda:1, mps; 'auto' takes the first accelerator there is."""
    busy: bool = False
    """Also time iterations beside a process that takes a core, in turn with some that have the machine for themselves:
    how many times as long they take."""
    suite: bool = False
    """All that should be seen on a new GPU instead: the quickstart, and models of real size beside their counts."""


def settings(options: BenchConfig) -> Config:
    """The preset's settings with what the options change. Raises UserError for options that cannot work."""
    if options.model and options.random:
        raise UserError("--model and --random each name the model that is timed: give one of them.")
    if options.iterations < 1:
        raise UserError(f"--iterations is {options.iterations} but must be at least 1.")
    config = load_preset(options.preset or PRESETS.get(options.random, "quickstart"), Config())
    model = replace(
        config.model,
        path=options.model or config.model.path,
        dtype=options.dtype or config.model.dtype,
        height=options.height or config.model.height,
        width=options.width or config.model.width,
        device=options.device,
        quantize=options.quantize or config.model.quantize,
    )
    data = replace(config.data, groups_per_iteration=options.groups or config.data.groups_per_iteration)
    rollout = replace(
        config.rollout,
        group_size=options.group_size or config.rollout.group_size,
        batch=options.batch or config.rollout.at_once,
    )
    reward = read_rewards(options.reward, "--reward") if options.reward else config.reward
    if options.random or not data.prompts:
        # such presets are of large models, whose rewards need weights that may not be here
        data, reward = replace(data, prompts=EMBEDDED), reward if options.reward else (ANY,)
    # the policy stays what it is: one that learns leaves groups without anything to learn, which cost less
    training = replace(config.training, lr=1e-12, micro_batch=options.micro_batch or config.training.at_once)
    recompute = {"on": True, "off": False}.get(options.checkpointing, config.memory.recompute)
    memory = replace(
        config.memory,
        gradient_checkpointing=recompute,
        compile=options.compile or config.memory.compile,
        offload_blocks=options.offload_blocks or config.memory.offload_blocks,
    )
    config = replace(config, model=model, data=data, rollout=rollout, reward=reward, training=training, memory=memory)
    validate(config)
    return config


class Bench:
    """One loaded model, timed under several settings."""

    def __init__(self, options: BenchConfig) -> None:
        self.options, self.config = options, settings(options)
        self.world = World(options.device)
        self.prompts = assemble.training_prompts(self.config)
        any_does = self.config.reward == (ANY,)
        self.rewards = (
            {ANY.name: Differing()} if any_does else assemble.training_rewards(self.config, self.world.device)
        )
        load = self.random_model if options.random else partial(assemble.load_model, self.config, self.world.device)
        self.policy, self.size = load()
        self.prompts = with_pictures(self.prompts, self.policy, self.size)

    def random_model(self) -> tuple[Policy, tuple[int, int]]:
        """What `assemble.load_model` gives, with random weights."""
        from dgpo_core.benchmark.random_model import random_policy  # imported late: it takes seconds

        model, lora = self.config.model, self.config.lora
        policy = random_policy(
            self.options.random,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            targets=lora.targets or None,
            dtype=model.dtype,
            device=self.world.device,
            seed=self.config.seed,
            offload=self.config.memory.move,
            quantize=model.kept_as,
            offload_blocks=self.config.memory.offload_blocks,
        )
        return policy, assemble.set_up(policy, self.config)

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
        G, P = self.config.rollout.group_size, self.config.data.groups_per_iteration
        result = {"model": self.model(), **self.iterations(G, P)}
        if self.options.scaling:
            whole = result["seconds_per_iteration"]
            # 1 is exactly linear: half the samples in half the time
            result["linearity"] = linearity = {}
            if G >= 4:  # a group has at least two samples
                half_size = self.iterations(G // 2, P)["seconds_per_iteration"]
                linearity["group_size"] = whole / half_size / (G / (G // 2))
            if P >= 2:
                half_groups = self.iterations(G, P // 2)["seconds_per_iteration"]
                linearity["groups"] = whole / half_groups / (P / (P // 2))
        if self.options.busy:
            result["busy"] = self.busy(G, P)
        return result

    def busy(self, G: int, P: int) -> dict[str, float]:
        """Iterations of P groups of G samples, by turns without and with another process that takes a core."""
        trainer = self.trainer(G, P)
        trainer.iterate()
        quiet, busy = [], []
        for _ in range(self.options.iterations):
            quiet.append(self.timed(trainer.iterate))
            with taking_a_core():
                busy.append(self.timed(trainer.iterate))
        ratio = statistics.median(b / a for a, b in zip(quiet, busy, strict=True))
        return {"quiet": statistics.median(quiet), "busy": statistics.median(busy), "ratio": ratio}

    def trainer(self, G: int, P: int) -> Trainer:
        """A training with P groups of G samples an iteration."""
        rollout, data = replace(self.config.rollout, group_size=G), replace(self.config.data, groups_per_iteration=P)
        config = replace(self.config, rollout=rollout, data=data)
        return Trainer(self.policy, self.prompts, self.rewards, config, size=self.size, world=self.world)

    def model(self) -> dict[str, Any]:
        """What is timed: model, number type of its frozen base, image size in pixels."""
        options, (height, width) = self.options, self.size
        name = f"{options.random} (random weights)" if options.random else self.config.model.path
        dtype = str(self.policy.dtype).removeprefix("torch.")
        return {"name": name, "dtype": dtype, "device": str(self.policy.device), "height": height, "width": width}

    def iterations(self, G: int, P: int) -> dict[str, Any]:
        """Time iterations of P groups of G samples, each next to its bare forwards and backwards."""
        trainer = self.trainer(G, P)
        bare = Bare(trainer)
        trainer.iterate()  # the first one warms up, and has no old policy to compare with
        bare.run(1.0)
        whole, least, done = [], [], []
        for _ in range(self.options.iterations):
            whole.append(self.timed(lambda: done.append(trainer.iterate())))
            least.append(self.timed(lambda: bare.run(done[-1].metrics["informative"])))
        seconds = statistics.median(whole)
        return {
            "groups": P,
            "group_size": G,
            "seconds_per_iteration": seconds,
            "samples_per_second": P * G / seconds,
            "phases": {name: statistics.median(d.seconds[name] for d in done) for name in done[0].seconds},
            "informative": statistics.median(d.metrics["informative"] for d in done),
            "unavoidable_seconds": statistics.median(least),
            "ratio": statistics.median(a / b for a, b in zip(whole, least, strict=True)),
            "peak_memory_gib": peak_memory(self.policy),
        }


BUSY = """
import os, sys, time
end = time.monotonic() + 600
while os.getppid() == int(sys.argv[1]) and time.monotonic() < end:
    pass
"""
"""A process that takes a core for as long as its parent lives, ten minutes at most."""


@contextmanager
def taking_a_core() -> Iterator[None]:
    """Inside, another process computes without end; it ends with this one, however that ends."""
    other = subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())], start_new_session=True)
    try:
        time.sleep(0.1)  # until it does
        yield
    finally:
        other.kill()
        other.wait()


class Bare:
    """The forwards and backwards of one iteration, on random input, and nothing else."""

    def __init__(self, trainer: Trainer) -> None:
        config, self.policy = trainer.config, trainer.policy
        # a benchmark loads diffusers' models alone, whose solvers know how often they call
        self.solver = cast(SchedulerSolver, trainer.step.solver)
        self.settings, self.cfg = config.training, config.rollout.cfg
        self.samples = config.rollout.group_size * config.data.groups_per_iteration
        self.rollout_batch = min(config.rollout.at_once or self.samples, self.samples)
        self.micro_batch = min(config.training.at_once, self.samples)
        (self.cond,), _ = self.policy.condition(trainer.stream.prompts[:1], "", trainer.step.size)
        self.shape = self.policy.latent_shape(*trainer.step.size)

    def run(self, informative: float) -> None:
        """Draw and decode `samples` samples, and train on them: on the share whose groups are informative with all that
        they are compared with, on the others with what the KL term needs, where there is one."""
        for size in sizes(self.samples, self.rollout_batch):
            self.draw(size)
        # whole groups go together where they fit
        useful = round(self.samples * informative)
        references = References.of(self.settings)
        compared = references.asked(self.settings.clip)
        for size in sizes(useful * self.settings.timesteps, self.micro_batch):
            self.train(size, compared)
        if references.kl:
            for size in sizes((self.samples - useful) * self.settings.timesteps, self.micro_batch):
                self.train(size, [references.kl])

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

    def train(self, size: int, compared: Sequence[Reference]) -> None:
        """The policies that are compared with, and forward and backward of the current one."""
        x, t, cond = self.inputs(size)
        with torch.no_grad():
            for reference in compared:
                with self.policy.using(reference.adapter):
                    for _ in range(reference.forwards):
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
    if sys.platform == "win32":
        import psutil  # accelerate brings it

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command(lambda: parse(BenchConfig, argv, "python -m dgpo_core.bench", __doc__), _bench)


def _bench(options: BenchConfig) -> None:
    if options.suite:
        print(suite.report(str(World(options.device).device), options.json))
        return
    if options.json:
        require_writable(options.json)
    result = Bench(options).run()
    print(json.dumps(result, indent=2))
    if options.json:
        write_atomic(options.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
