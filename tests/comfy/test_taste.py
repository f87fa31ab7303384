"""Taste in a real ComfyUI: the ranker asks only where it is unsure, and the node makes a reward of the answers."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from comfy_server import REPO, ComfyServer, ExecutionFailed, PromptRefused

from dgpo_core.rewards.taste.model import Taste

GROUPS = REPO / "tests" / "comfy" / "packs" / "comfy_groups"
RUN = "test"  # of the pack's groups
SIZE = 4


@pytest.fixture(scope="module")
def server(_comfyui: None) -> Iterator[ComfyServer]:
    with ComfyServer({"dgpo": REPO, "test_groups": GROUPS}) as running:
        yield running


@pytest.fixture(scope="module")
def asked(server: ComfyServer) -> list[int]:
    """Somebody prefers what is brighter, and answers ten rounds of four groups: of how many they were asked in each."""
    return [_round(server, variant) for variant in range(10)]


def groups(variant: int) -> dict[str, Any]:
    inputs = {"groups": 4, "size": SIZE, "height": 64, "width": 64, "variant": 10 * variant}
    return {"class_type": "TestGroups", "inputs": inputs}


def _round(server: ComfyServer, variant: int) -> int:
    ranker = {"groups": ["1", 0], "mode": "rank", "timeout": 120, "on_timeout": "cancel", "preset": "", "taste": True}
    shown = {"class_type": "TestScores", "inputs": {"groups": ["2", 0], "best": ["2", 1]}}
    prompt = server.queue({"1": groups(variant), "2": {"class_type": "DGPO_HumanRanker", "inputs": ranker}, "3": shown})
    count = 0
    while prompt not in server.get(f"/history/{prompt}"):
        for question in server.get("/dgpo/questions")["questions"]:
            count += len(question["groups"])
            best_first = {"ranking": [[i] for i in range(SIZE)]}  # the pack's first picture is the brightest
            said = {"token": question["token"], "groups": [best_first] * len(question["groups"])}
            server.post(f"/dgpo/questions/{question['token']}", said)
        time.sleep(0.1)
    scores = json.loads(server.wait(prompt)["outputs"]["3"]["text"][0])["scores"]
    assert all(row.index(max(row)) == 0 for row in scores if any(row))
    return count


def taste(**inputs: Any) -> dict[str, Any]:
    """The node, and groups that it scores."""
    return {
        "1": groups(20),
        "2": {"class_type": "DGPO_Taste", "inputs": {"name": "mine", "sources": RUN, "weight": 1.0, **inputs}},
        "3": {"class_type": "DGPO_RewardScorer", "inputs": {"groups": ["1", 0], "reward": ["2", 0]}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}},
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}},
    }


def test_the_ranker_asks_less_and_less(server: ComfyServer, asked: list[int]) -> None:
    assert asked[0] == 4
    assert sum(asked[-5:]) < 10  # of 20
    lines = (server.base / "output/dgpo" / RUN / "asked/answers.jsonl").read_text().splitlines()
    by = [json.loads(line).get("by", "") for line in lines]
    assert by.count("") == sum(asked)
    assert by.count("taste") == 40 - sum(asked)


def test_the_node_makes_a_reward_of_the_answers(server: ComfyServer, asked: list[int]) -> None:
    entry = server.run(taste())
    report = json.dumps(entry["outputs"]["5"])
    assert f"made of {sum(asked)} groups" in report
    assert "of the pairs (95 % interval" in report
    file = server.base / "models/reward_models/mine.safetensors"
    assert Taste.load(file).groups == sum(asked)
    scores = [float(value) for value in _numbers(entry["outputs"]["4"])]
    assert len(scores) == 16
    assert sum(max(row) == row[0] for row in zip(*[iter(scores)] * SIZE, strict=True)) >= 3
    again = server.run(taste(sources="", weight=2.0))  # as it is
    assert [float(value) / 2 for value in _numbers(again["outputs"]["4"])] == scores


def _numbers(output: dict[str, Any]) -> list[str]:
    return [number for text in output["text"] for number in text.strip("[]").split(",")]


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"sources": "never_trained"}, "No answers are kept of a training 'never_trained'"),
        ({"sources": "input/../../secret"}, "in ComfyUI's input folder"),
        ({"name": "../x"}, "cannot be a folder name"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(server: ComfyServer, inputs: dict[str, str], says: str) -> None:
    with pytest.raises(PromptRefused) as refused:
        server.run(taste(**inputs))
    assert says in json.dumps(refused.value.node_errors["2"])


def test_no_other_weights_are_written_over(server: ComfyServer, asked: list[int]) -> None:
    other = server.base / "models/reward_models/other.safetensors"
    other.write_bytes(b"not a taste")
    with pytest.raises(ExecutionFailed, match="The taste .*other.safetensors cannot be read"):
        server.run(taste(name="other"))
    assert other.read_bytes() == b"not a taste"
