"""A custom node pack for the tests of Human Ranker: groups of plain pictures, and what scores came out of it.

The engine is imported when a node runs: only then are all packs loaded.
"""

import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from comfy_api.v0_0_2 import ComfyExtension, io, ui
from PIL import Image, ImageDraw, ImageFont

PROMPTS = ("a red circle left of a blue square", "three green triangles", "a small star above a large one")


@cache
def values() -> ModuleType:
    """The pack's nodes/common/values.py."""
    path = Path(__file__).resolve().parents[4] / "nodes" / "common" / "values.py"
    spec = importlib.util.spec_from_file_location("test_values", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(group: int, image: int, height: int, width: int) -> torch.Tensor:
    """A coloured plane with its number on it, [3, H, W]; the first of a group is the brightest."""
    hue, light = (group * 97 + image * 23) % 256, max(60, 240 - 25 * image)
    plane = Image.new("HSV", (width, height), (hue, 150, light)).convert("RGB")
    font = ImageFont.load_default(size=height // 2)
    ImageDraw.Draw(plane).text((width // 2, height // 2), str(image + 1), "white", font, anchor="mm")
    return torch.frombuffer(bytearray(plane.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1) / 255


class TestGroups(io.ComfyNode):
    """Groups that no model drew."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        numbers = {"groups": 2, "size": 4, "height": 128, "width": 128, "variant": 0}
        return io.Schema(
            node_id="TestGroups",
            category="test",
            inputs=[io.Int.Input(name, default=default, min=0, max=4096) for name, default in numbers.items()],
            outputs=[io.Custom("DGPO_GROUP").Output()],
        )

    @classmethod
    def execute(cls, groups: int, size: int, height: int, width: int, variant: int) -> io.NodeOutput:
        from dgpo_core.common.group import Group
        from dgpo_core.common.prompts import Prompt
        from dgpo_core.settings.config import LoraConfig, MemoryConfig, ModelConfig, RolloutConfig

        v = values()
        drawn = tuple(
            Group(
                Prompt(PROMPTS[g % len(PROMPTS)]),
                tuple(range(size)),
                torch.zeros(size, 4, 2, 2),
                torch.stack([picture(g + variant, i, height, width) for i in range(size)]),
            )
            for g in range(groups)
        )
        policy = v.PolicyHandle(v.PolicySpec("test", 0, ModelConfig(), LoraConfig(), MemoryConfig()), state="s")
        key = v.key_of("TestGroups", groups, size, height, width, variant)
        return io.NodeOutput(v.Groups(drawn, policy, v.Sampler(RolloutConfig()), 0, key))


class TestReward(io.ComfyNode):
    """The brightness of a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="TestReward", category="test", outputs=[io.Custom("DGPO_REWARD").Output()])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from dgpo_core.settings.config import RewardTerm

        return io.NodeOutput((RewardTerm("brightness"),))


class TestScores(io.ComfyNode):
    """Gives the scores to who reads the history, as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestScores",
            category="test",
            is_output_node=True,
            inputs=[io.Custom("DGPO_GROUP").Input("groups"), io.Image.Input("best")],
        )

    @classmethod
    def execute(cls, groups: Any, best: torch.Tensor) -> io.NodeOutput:
        term = groups.terms[0].name
        scores = [group.scores[term].tolist() for group in groups.groups]
        found = {"reward": term, "scores": scores, "best": list(best.shape)}
        return io.NodeOutput(ui=ui.PreviewText(json.dumps(found)))


class Extension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TestGroups, TestReward, TestScores]


async def comfy_entrypoint() -> Extension:
    """Called by ComfyUI once, at its start."""
    return Extension()
