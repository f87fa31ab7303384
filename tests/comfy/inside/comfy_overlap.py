"""Run by `test_progress.py` in ComfyUI's folder and interpreter: draws and scores two groups as the Training Loop does,
with a reward on a server, and prints as JSON what came of it beside drawing first and scoring then.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))
import utils.install_util  # noqa: F401 - before another module that is called `utils` hides ComfyUI's

# isort: split
import comfy_lora  # noqa: F401 - makes the pack's nodes importable

# isort: split
import folder_paths
from judge_server import serving
from torch import Tensor

from dgpo_core.common.prompts import Prompt
from dgpo_core.rewards import Reward, make_reward
from dgpo_core.rewards.serve import RewardServer
from dgpo_core.settings.config import LoraConfig, MemoryConfig, ModelConfig, RewardTerm, RolloutConfig

sessions = importlib.import_module("pack.runs.sessions")
values = importlib.import_module("pack.common.values")

SIZE, STEPS, LONGEST = 3, 2, 60  # of a group; of a sampler; seconds to wait for what never comes


class Noting(Reward):
    """Brightness that says when it is asked."""

    def __init__(self) -> None:
        self.asked, self.reward = threading.Event(), make_reward("brightness")

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        self.asked.set()
        return self.reward.score(images, prompts, metadata)


def main(folder: Path) -> dict[str, Any]:
    spec = values.PolicySpec("overlap", 0, ModelConfig(), LoraConfig(rank=2), MemoryConfig())
    sampler = values.Sampler(RolloutConfig(solver="euler", steps=STEPS, cfg=1.0, group_size=SIZE, batch=SIZE))
    handle = sessions.store(spec).at(0)
    places = [(0, Prompt("a red circle")), (1, Prompt("a blue square"))]
    noting, ticks, in_time = Noting(), [0], [True]

    def tick() -> None:
        ticks[0] += 1
        if ticks[0] == STEPS + 2:  # well in the second group
            in_time[0] = noting.asked.wait(LONGEST)

    with serving(RewardServer("brightness", noting, "127.0.0.1", 0)) as url:
        endpoints = folder / "endpoints.yaml"
        endpoints.write_text(f"here: {{url: '{url}'}}\n", encoding="utf-8")
        os.environ["DGPO_ENDPOINTS"] = str(endpoints)
        terms = (RewardTerm("remote", 1.0, {"endpoint": "here", "batch": SIZE}),)
        together = sessions.draw_scored(handle, places, sampler, 0, terms, tick)
        apart = sessions.score(sessions.draw(handle, places, sampler, 0, lambda: None), terms)
    scores = [[group.scores["remote"].tolist() for group in groups.groups] for groups in (together, apart)]
    return {"beside": in_time[0], "ticks": ticks[0], "scores": scores, "keys": [together.key, apart.key]}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base:
        folder_paths.set_output_directory(base)
        print(json.dumps(main(Path(base))))
