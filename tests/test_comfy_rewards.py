"""Rewards in a real ComfyUI: what is missing is told before anything runs; weights in reward_models are found."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny_clip
from comfy_server import ComfyServer, PromptRefused
from test_comfy_training import REWARD, SCORE, TRAIN, files, loop, visual


def refusal(server: ComfyServer, run: str, **reward: Any) -> str:
    """What the node Reward says while the graph is validated; nothing has been drawn."""
    with pytest.raises(PromptRefused) as refused:
        server.run(visual(run, Reward=reward))
    (error, *_) = refused.value.node_errors[REWARD]["errors"]
    assert files(server, run) == {}
    return str(error["details"])


def test_missing_weights_are_told_with_size_and_place_before_anything_is_drawn(comfy: ComfyServer) -> None:
    said = refusal(comfy, "missing", name="pickscore")
    assert "needs yuvalkirstain/PickScore_v1 (3.9 GB)" in said
    assert f"put it into {comfy.base / 'models' / 'reward_models'} as PickScore_v1" in said


def test_weights_in_the_reward_models_folder_are_found(comfy: ComfyServer) -> None:
    tiny_clip.save(comfy.base / "models" / "reward_models" / "clip-vit-large-patch14")
    entry = comfy.run(visual("clip", Reward={"name": "clip_score"}))
    assert SCORE in entry["outputs"]
    assert files(comfy, "clip")


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (
            {"name": "mine/rewards.py:Redness"},
            "the Python file of a reward (mine/rewards.py:Redness), which is not run",
        ),
        ({"name": "brightnes"}, "did you mean 'brightness'?"),
        ({"only_if": "ocr = 1"}, "must be a reward and a number, such as ocr > 0.5"),
    ],
)
def test_what_a_workflow_may_not_ask_for_is_refused(comfy: ComfyServer, reward: dict[str, Any], says: str) -> None:
    assert says in refusal(comfy, "refused", **reward)


def test_a_reward_counts_only_where_another_one_says_so(comfy: ComfyServer) -> None:
    graph = loop("gated", 1, Reward={"only_if": "brightness > 0.5"})
    graph["30"] = {
        "class_type": "DGPO_Reward",
        "inputs": {"name": "brightness", "weight": 0.0, "options": "", "reward": [REWARD, 0]},
    }
    graph[TRAIN]["inputs"]["reward"] = ["30", 0]
    graph["31"] = {"class_type": "PreviewAny", "inputs": {"source": [TRAIN, 4]}}
    text = json.dumps(comfy.run(graph)["outputs"]["31"])
    assert "gated/shapes_graded" in text
    assert "reward_std/brightness" in text
