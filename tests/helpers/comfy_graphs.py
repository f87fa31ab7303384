"""Graphs of a training in ComfyUI, by the shared workflows made small: draw, score, train and save, or the loop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from comfy_server import REPO

Graph = dict[str, dict[str, Any]]
QUICK = {
    "DGPO_LoadPolicy": {"rank": 4, "alpha": 8.0},
    "DGPO_Prompts": {"per_iteration": 1},
    "DGPO_SamplerSettings": {"group_size": 8},
    "DGPO_TrainingSettings": {"lr": 0.01},
}
POLICY, PROMPTS, SAMPLER, DRAW, REWARD, SCORE, SETTINGS, TRAIN, SAVE = "123456789"


def workflow(name: str, **inputs: Mapping[str, Any]) -> Graph:
    """One of the workflows, made small; `inputs` are by kind of node, without its prefix."""
    graph: Graph = json.loads((REPO / "workflows" / "api" / f"{name}.json").read_text("utf-8"))
    changes = [*QUICK.items(), *((f"DGPO_{kind}", values) for kind, values in inputs.items())]
    for kind, values in changes:
        for node in graph.values():
            if node["class_type"] == kind:
                node["inputs"].update(values)
    return graph


def visual(run: str, iteration: int = 0, **inputs: Mapping[str, Any]) -> Graph:
    """Draw, score, train and save, one iteration."""
    graph = workflow("visual_loop", **inputs)
    graph[POLICY]["inputs"]["run"] = run
    graph[DRAW]["inputs"]["iteration"] = iteration
    return graph


def loop(run: str, iterations: int, save_every: int = 10, **inputs: Mapping[str, Any]) -> Graph:
    """The Training Loop with the settings of `visual`, and the node that saves."""
    graph = visual(run, **inputs)
    told = {"sampler": SAMPLER, "prompts": PROMPTS, "reward": REWARD, "settings": SETTINGS, "policy": POLICY}
    links = {name: [node, 0] for name, node in told.items()}
    options = {"iterations": iterations, "save_every": save_every, "weights": graph[TRAIN]["inputs"]["weights"]}
    graph[TRAIN] = {"class_type": "DGPO_TrainingLoop", "inputs": {**links, **options}}
    return {key: node for key, node in graph.items() if key not in (DRAW, SCORE)}


def chain(graph: Graph, start: str, policy: str, trained: str = "") -> Graph:
    """The nodes of one more step behind `trained` (else from the policy's node), as `start` + their ids."""
    copies = {key: json.loads(json.dumps(graph[key])) for key in (DRAW, SCORE, TRAIN, SAVE)}
    source = [trained or policy, 0]
    copies[DRAW]["inputs"] |= {"policy": source, "iteration": 1 if trained else 0}
    copies[SCORE]["inputs"]["groups"] = [start + DRAW, 0]
    copies[TRAIN]["inputs"] |= {"policy": source, "scored": [start + SCORE, 0]}
    copies[SAVE]["inputs"]["lora"] = [start + TRAIN, 1]
    return {start + key: node for key, node in copies.items()}
