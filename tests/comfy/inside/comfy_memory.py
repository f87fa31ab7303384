"""Run by `test_memory.py` in ComfyUI's folder and interpreter: prints the batches that an accelerator, which has
room for two samples only, was asked for, as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))
import utils.install_util  # noqa: F401 - before another module that is called `utils` hides ComfyUI's

# isort: split
import comfy_lora  # noqa: F401 - makes the pack's nodes importable

# isort: split
import folder_paths
import torch

from dgpo_core.common.prompts import Prompt
from dgpo_core.settings.config import LoraConfig, MemoryConfig, ModelConfig, RewardTerm, RolloutConfig, TrainingConfig

sessions = importlib.import_module("pack.runs.sessions")
values = importlib.import_module("pack.common.values")
ROOM = 2


def main() -> dict[str, Any]:
    """The batch of every forward, for drawing, learning and comparing, twice each."""
    spec = values.PolicySpec("memory", 0, ModelConfig(), LoraConfig(rank=2), MemoryConfig())
    rollout = RolloutConfig(solver="euler", steps=1, cfg=1.0, group_size=4, batch=0)
    sampler = values.Sampler(rollout)
    handle = values.PolicyHandle(spec, 0, sessions.root_key(spec))
    asked: list[int] = []
    policy = sessions._load(spec).policy
    predict = policy.predict

    def tight(x_t: torch.Tensor, *rest: Any) -> torch.Tensor:
        asked.append(len(x_t))
        if len(x_t) > ROOM:
            raise torch.OutOfMemoryError("no room")
        return predict(x_t, *rest)

    policy.predict = tight

    def batches(work: Any) -> list[int]:
        asked.clear()
        work()
        return list(asked)

    def draw() -> Any:
        return sessions.draw(handle, [(0, Prompt("a red circle"))], sampler, 0, lambda: None)

    def learn(lr: float) -> list[int]:
        training = TrainingConfig(timesteps=1, t_min=0.0, micro_batch=4, clip=0.0, kl_weight=0.0, lr=lr)
        scored = sessions.score(draw(), (RewardTerm("jpeg_size"),))
        return batches(lambda: sessions.learn(handle, scored, values.Training(training), lambda: None))

    def compare() -> None:
        sessions.draw_with(handle, None, [Prompt("a red circle")], range(4), sampler)

    first = {"draw": batches(draw), "learn": learn(1e-3)}
    again = {"draw": batches(draw), "learn": learn(1e-4), "compare": batches(compare)}
    sessions._load(spec).fits.clear()
    return {"first": first, "again": again, "compare": batches(compare)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        print(json.dumps(main()))
