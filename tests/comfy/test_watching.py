"""The Training Loop with held-out prompts, in a real ComfyUI: in-domain and watched side by side, and the alarm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from comfy_graphs import PROMPTS, TRAIN, Graph, loop
from comfy_results import equal, files, line, lora, steps_done, tensors
from comfy_server import ComfyServer, PromptRefused, images
from safetensors import safe_open

HELD_OUT, WATCHED, SAID = "held_out", "watched", "said"


def watching(run: str, iterations: int, inputs: Mapping[str, Any], **others: Mapping[str, Any]) -> Graph:
    """A loop that measures 8 images every other iteration, and shows its metrics as text."""
    graph = loop(run, iterations, **others)
    graph[HELD_OUT] = json.loads(json.dumps(graph[PROMPTS]))
    graph[HELD_OUT]["inputs"]["source"] = "embedded, held out"
    measured = {"held_out": [HELD_OUT, 0], "evaluate_every": 2, "evaluation_images": 8}
    graph[TRAIN]["inputs"] |= {**measured, **inputs}
    graph[SAID] = {"class_type": "PreviewAny", "inputs": {"source": [TRAIN, 4]}}
    return graph


def shapes(graph: Graph) -> Graph:
    """With the verifier's verdict watched."""
    graph[WATCHED] = {"class_type": "DGPO_Reward", "inputs": {"name": "shapes", "weight": 1.0, "options": ""}}
    graph[TRAIN]["inputs"]["watch"] = [WATCHED, 0]
    return graph


def measured(comfy: ComfyServer, run: str) -> dict[str, Any]:
    return {name: what for name, what in files(comfy, run).items() if name.startswith("evaluation_")}


def test_watched_rewards_are_shown_beside_the_trained_one_and_change_nothing(comfy: ComfyServer) -> None:
    entry = comfy.run(shapes(watching("seen", 4, {})))
    said = entry["outputs"][SAID]["text"][0]
    assert "iteration 4: in-domain " in said
    for name in ("shapes", "edge_density", "entropy", "saturation", "group_diversity"):
        assert f"{name} " in said.partition("| watched: ")[2]
    (picture,) = images({"outputs": {TRAIN: entry["outputs"][TRAIN]}})
    (plain,) = images({"outputs": {TRAIN: comfy.run(loop("seen_not", 4))["outputs"][TRAIN]}})
    assert comfy.view(picture).width > 1.5 * comfy.view(plain).width  # panels beside the curve
    assert equal(tensors(lora(comfy, entry)), tensors(lora(comfy, comfy.run(loop("seen_not", 4)))))
    before = measured(comfy, "seen")
    assert len(before) == 3  # the base, 2 and 4
    comfy.run(shapes(watching("seen", 6, {})))
    assert before.items() <= measured(comfy, "seen").items()  # nothing was drawn again
    assert len(measured(comfy, "seen")) == 4


def test_the_alarm_stops_the_loop_at_the_best_state_before(comfy: ComfyServer) -> None:
    hacked = {"Reward": {"name": "brightness"}, "Prompts": {"per_iteration": 4}, "TrainingSettings": {"lr": 0.02}}
    inputs = {"evaluation_images": 32, "on_alarm": "stop"}
    graph = shapes(watching("hacked", 60, inputs, **hacked))
    prompt = comfy.queue(graph)
    entry = comfy.wait(prompt)
    made = max(steps_done(comfy, prompt))
    assert made < 60
    assert "Warning: the reward may be hacked: since iteration" in entry["outputs"][SAID]["text"][0]
    path = comfy.base / "output" / "loras" / entry["outputs"]["9"]["text"][0]
    with safe_open(path, "pt") as file:
        best = int(file.metadata()["dgpo.step"])
    assert best < made
    assert len(line(comfy, "hacked")) == made  # nothing is lost
    # the same again: it neither goes on nor forgets what was best
    graph[TRAIN]["inputs"]["iterations"] = 61
    prompt = comfy.queue(graph)
    again = comfy.wait(prompt)
    assert max(steps_done(comfy, prompt)) == made
    assert lora(comfy, again) == lora(comfy, entry)


def test_a_trained_reward_cannot_be_watched_and_watching_needs_prompts(comfy: ComfyServer) -> None:
    graph = shapes(watching("both", 2, {}, Reward={"name": "shapes"}))
    with pytest.raises(PromptRefused, match="shapes is trained, so it cannot be measured besides"):
        comfy.run(graph)
    graph = shapes(watching("none", 2, {}))
    del graph[TRAIN]["inputs"]["held_out"]
    with pytest.raises(PromptRefused, match="measured on test prompts: connect some to"):
        comfy.run(graph)
