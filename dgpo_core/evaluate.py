"""`python -m dgpo_core.evaluate --lora FILE`: measure an adapter against its base again, from the file alone.

Model, held-out prompts, reward, solver and guidance are those the file says it was made with, unless options say
otherwise; the seeds are the fixed ones of every evaluation.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from safetensors import SafetensorError, safe_open

from dgpo_core import assemble, config_io
from dgpo_core.cli import parse
from dgpo_core.config import Config, Range
from dgpo_core.distributed import World
from dgpo_core.errors import UserError
from dgpo_core.files import write_atomic
from dgpo_core.measure import evaluation_weights, measure


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure."""

    lora: Path
    """The adapter, a .safetensors file that `dgpo_core.train` wrote."""
    json: Path | None = None
    """Write the result to this file, in the form of a run's summary.json."""
    images: Annotated[int, Range(2)] = 512
    """Images of base and adapter each, at least 2."""
    model: str = ""
    """The base model; empty is the one that the file names."""
    prompts: str = ""
    """A .txt or .jsonl file of prompts; empty is the held-out prompts that the file names."""
    reward: str = ""
    """The reward to measure; empty is the one that the file names."""
    device: str = "auto"
    """Where to run: cpu, cuda, cuda:1, mps; 'auto' takes the first accelerator there is."""


def settings_of(path: Path) -> tuple[Config, int]:
    """The settings that a LoRA was trained with, and its step, from the file's metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"There is no LoRA file {path}.") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a LoRA in safetensors format ({error}).") from None
    if "dgpo.config" not in metadata:
        raise UserError(f"{path} was not written by DGPO: its metadata do not say how it was trained.")
    config = config_io.from_dict(json.loads(metadata["dgpo.config"]), source=str(path))
    return config, int(metadata.get("dgpo.step", 0))


def evaluate(options: EvaluateConfig) -> dict[str, object]:
    """Measure base and adapter; returns what --json writes, but for the seconds."""
    config, step = settings_of(options.lora)
    config = replace(
        config,
        model=replace(config.model, path=options.model or config.model.path, device=options.device),
        lora=replace(config.lora, init=str(options.lora)),
        data=replace(config.data, held_out=options.prompts or config.data.held_out),
        evaluation=replace(config.evaluation, reward=options.reward or config.evaluation.reward),
    )
    world = World(options.device)
    prompts = assemble.held_out_prompts(config)
    if not prompts:
        raise UserError("The file names no held-out prompts: give some with --prompts FILE.")
    judges = assemble.evaluation_rewards(config, {}, world) if config.evaluation.reward else None
    judges = judges or assemble.training_rewards(config, world)
    policy, size = assemble.load_model(config, world)
    result: dict[str, object] = {"reward": "+".join(evaluation_weights(config)), "iterations": step}
    for name, adapter in (("base", None), ("adapter", "current")):
        found = measure(policy, adapter, prompts, judges, config, size, options.images, world)
        print(f"{name:8} {result['reward']}  {found}", flush=True)
        result[name] = found.as_json()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 after a user's mistake."""
    try:
        options = parse(EvaluateConfig, argv, "python -m dgpo_core.evaluate", __doc__)
        start = time.monotonic()
        result = evaluate(options)
        result["seconds"] = time.monotonic() - start
        if options.json:
            write_atomic(options.json, json.dumps(result, indent=2) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
