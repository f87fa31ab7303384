"""Rewards in a real ComfyUI: what is missing is told before anything runs; weights in reward_models are found."""

from __future__ import annotations

import json
import os
import shutil
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_clip
from comfy_graphs import REWARD, SCORE, TRAIN, loop, visual
from comfy_results import files
from comfy_server import ComfyServer, PromptRefused, RequestFailed
from judge_server import serving

from dgpo_core.rewards import make_reward
from dgpo_core.rewards.serve import RewardServer


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


@pytest.fixture
def models(comfy: ComfyServer) -> Iterator[Path]:
    """A folder inside of models/reward_models."""
    folder = comfy.base / "models" / "reward_models" / "one_file"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def choices(server: ComfyServer) -> list[str]:
    """What the widget for the weights of a Reward offers."""
    kind, about = server.get("/object_info/DGPO_Reward")["DGPO_Reward"]["input"]["optional"]["weights_file"]
    return about["options"] if kind == "COMBO" else kind


def test_weights_in_one_file_are_offered_and_score_with_comfyuis_tokenizer(
    comfy: ComfyServer, models: Path, tmp_path: Path
) -> None:
    assert choices(comfy)[0] == "automatic"
    assert "PickScore_v1.safetensors" not in choices(comfy)
    whole = tiny_clip.save(tmp_path, words=tiny_clip.ALL_WORDS, **tiny_clip.WHOLE_HEADS)
    shutil.copy(whole / "model.safetensors", models / "mine.safetensors")
    chosen = os.path.join("one_file", "mine.safetensors")
    assert chosen in choices(comfy)
    entry = comfy.run(visual("one_file", Reward={"name": "pickscore", "weights_file": chosen}))
    assert SCORE in entry["outputs"]
    assert files(comfy, "one_file")


@pytest.mark.parametrize(
    ("name", "choice", "says"),
    [
        ("pickscore", "mine.safetensors", "There is no file mine.safetensors in the folder of reward models"),
        ("pickscore", "../../input/mine.safetensors", "are not the name of a file in the folder of reward models"),
        ("pickscore", "one_file/text.safetensors", "is not a CLIP model as transformers saves it"),
        ("brightness", "mine.safetensors", "'brightness' does not take the weights mine.safetensors"),
    ],
)
def test_weights_that_will_not_do_are_told_before_anything_is_drawn(
    name: str, choice: str, says: str, comfy: ComfyServer, models: Path
) -> None:
    (models / "text.safetensors").write_text("a text")
    said = refusal(comfy, "weights", name=name, weights_file=choice)
    assert said.startswith("weights_file - ")
    assert says in said


def test_the_published_weights_may_be_chosen_where_they_are_not_since_they_can_be_downloaded(
    comfy: ComfyServer, models: Path
) -> None:
    said = refusal(comfy, "hub", name="pickscore", weights_file="PickScore_v1.safetensors")
    assert said == refusal(comfy, "hub", name="pickscore")
    assert "needs yuvalkirstain/PickScore_v1 (3.9 GB)" in said
    (models.parent / "PickScore_v1").mkdir()
    try:  # what is here in another form is not called missing by the front end
        assert "PickScore_v1.safetensors" in choices(comfy)
    finally:
        (models.parent / "PickScore_v1").rmdir()


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


# --- where pictures and keys go -------------------------------------------------------------------------------------


def test_a_workflow_names_an_endpoint_of_the_users_own_file_and_nothing_else(comfy: ComfyServer) -> None:
    file = comfy.base / "user/__dgpo/endpoints.yaml"
    address = {"url": "http://127.0.0.1:1"}
    for options in (address, {"token_env": "HOME"}, {"endpoint": "x", **address}):
        said = refusal(comfy, "address", name="remote", options=json.dumps(options))
        assert "which only you can decide on this machine" in said
        assert 'use {"endpoint": "my_server"} instead' in said
        assert f"into {file} " in said
    assert "sets the option path" in refusal(comfy, "path", name="clip_score", options='{"path": "/data"}')
    for options in ("", '{"endpoint": "card2"}'):
        said = refusal(comfy, "unknown", name="remote", options=options)
        assert "write a line such as" in said
        assert f"into {file} " in said
    with serving(RewardServer("brightness", make_reward("brightness"), "127.0.0.1", 0)) as url:
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"card2: {{url: '{url}'}}\n")
        comfy.run(visual("named", Reward={"name": "remote", "options": '{"endpoint": "card2"}'}))
    assert files(comfy, "named")


def test_comfyuis_routes_do_not_reach_the_file_of_endpoints(comfy: ComfyServer) -> None:
    file = comfy.base / "user/__dgpo/endpoints.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine: {url: 'http://127.0.0.1:1'}\n")
    for name in ("../__dgpo/endpoints.yaml", "x/../../__dgpo/endpoints.yaml", str(file)):
        for path in (urllib.parse.quote(name, safe=""), urllib.parse.quote(urllib.parse.quote(name, safe=""), safe="")):
            for method, body in (("POST", b"evil"), ("GET", None), ("DELETE", None)):
                with pytest.raises(RequestFailed):
                    comfy.request(method, f"/userdata/{path}", body)
            with pytest.raises(RequestFailed):
                comfy.get(f"/view?filename={path}&type=input")
    assert file.read_text() == "mine: {url: 'http://127.0.0.1:1'}\n"
