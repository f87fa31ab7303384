"""Run by `test_progress.py` in ComfyUI's folder and interpreter: prints, for several kinds of updates, how many steps
the bar of DGPO LoRA Trainer has and how many the update took, as JSON.
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

from dgpo_core.common.prompts import Prompt
from dgpo_core.settings.config import LoraConfig, MemoryConfig, ModelConfig, RolloutConfig, TrainingConfig

loop = importlib.import_module("pack.runs.loop")
sessions = importlib.import_module("pack.runs.sessions")
values = importlib.import_module("pack.common.values")

SIZE = 4  # of a group
SCORES = {
    "different": [1.0, 2.0, 3.0, 4.0, 1.0, 1.0, 2.0, 2.0],
    "one equal": [1.0, 2.0, 3.0, 4.0, 1.0, 1.0, 1.0, 1.0],
    "equal": [1.0] * 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "no KL term": {"kl_weight": 0.0},
    "KL term": {},
    "guided": {"kl_cfg": 4.5},
    "one group at once": {"micro_batch": 7},
    "cut groups": {"micro_batch": 3, "kl_cfg": 4.5},
}


def main() -> dict[str, list[int]]:
    """[steps of the bar, steps taken] by scores and kind, of the first update, whose old policy is the current one."""
    spec = values.PolicySpec("progress", 0, ModelConfig(), LoraConfig(rank=2), MemoryConfig())
    sampler = values.Sampler(RolloutConfig(solver="euler", steps=1, cfg=1.0, group_size=SIZE))
    handle = sessions.store(spec).at(0)
    places = [(0, Prompt("a red circle")), (1, Prompt("a blue square"))]
    groups = sessions.draw(handle, places, sampler, 0, lambda: None)
    bars = {}
    for name, scores in SCORES.items():
        scored = values.with_scores(groups, scores, name)
        for kind, changes in KINDS.items():
            plain = {"timesteps": 3, "timestep_source": "uniform", "t_min": 0.0, "micro_batch": 8, "clip": 0.0}
            training = values.Training(TrainingConfig(**{**plain, **changes}))
            ticks: list[None] = []
            sessions.learn(handle, scored, training, lambda ticks=ticks: ticks.append(None))
            bars[f"{name}, {kind}"] = [loop.update_steps(scored, training), len(ticks)]
    return bars


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        print(json.dumps(main()))
