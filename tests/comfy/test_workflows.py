"""Every shared workflow runs to its end in a real ComfyUI; sizes are made small, nothing else is changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_checkpoint import checkpoint
from comfy_graphs import Graph
from comfy_server import REPO, ComfyServer, images
from PIL import Image

API = REPO / "workflows" / "api"
NAMES = sorted(path.stem for path in API.glob("*.json"))
NATIVE = [name for name in NAMES if name.startswith("native_")]
NEWER = {  # by workflow of a model that an older ComfyUI does not know: its file
    "native_flux2_klein": "flux-2-klein-base-4b.safetensors",
    "native_zimage": "z_image_bf16.safetensors",
}
SMALL_NATIVE: dict[str, dict[str, Any]] = {
    "DGPO_NativePolicy": {"rank": 4, "alpha": 8.0},
    "DGPO_Prompts": {"per_iteration": 1},
    "DGPO_SamplerSettings": {"group_size": 2, "height": 64, "width": 64},
    "DGPO_Reward": {"name": "brightness", "weights_file": "automatic"},  # PickScore would have to be downloaded
    "DGPO_TrainingLoop": {"iterations": 1},
    "DGPO_BeforeAfter": {"first": 1, "images": 1},
}
SMALL: dict[str, dict[str, dict[str, Any]]] = {  # by workflow and kind of node
    "any_node_as_reward": {"DGPO_Prompts": {"per_iteration": 2}},
    "apply_lora": {
        "DGPO_LoRALoader": {"lora_name": "test_workflows.safetensors"},
        "DGPO_SamplerSettings": {"height": 64, "width": 64, "steps": 2},
        "EmptyLatentImage": {"height": 64, "width": 64},
        "KSampler": {"steps": 2},
    },
    "gallery_preferences": {},
    "human_ranking": {"DGPO_HumanRanker": {"preset": "1>2=3>4>5>6; 2>1>3>4>5>6"}},  # else it asks a person
    "quickstart": {
        "DGPO_Prompts": {"per_iteration": 4},
        "DGPO_SamplerSettings": {"group_size": 12},
        "DGPO_TrainingLoop": {"iterations": 20},
    },
    "quickstart_edits": {
        "DGPO_Prompts": {"per_iteration": 2},
        "DGPO_SamplerSettings": {"group_size": 4},
        "DGPO_TrainingLoop": {"iterations": 2, "evaluation_images": 4},
        "DGPO_BeforeAfter": {"first": 1, "images": 2},
    },
    "visual_loop": {"DGPO_Prompts": {"per_iteration": 2}},
    **dict.fromkeys(NATIVE, SMALL_NATIVE),
}


def workflow(name: str) -> Graph:
    """The graph, made small."""
    graph: Graph = json.loads((API / f"{name}.json").read_text("utf-8"))
    for kind, inputs in SMALL.get(name, {}).items():
        nodes = [node for node in graph.values() if node["class_type"] == kind]
        assert nodes, f"{name} has no {kind} any more"
        for node in nodes:
            assert inputs.keys() <= node["inputs"].keys()
            node["inputs"].update(inputs)
    return graph


# --- what the workflows need -----------------------------------------------------------------------------------------


def pictures(comfy: ComfyServer) -> None:
    """One that is liked and one that is not, larger than the model's."""
    for name, colour in (("dgpo_liked.png", "red"), ("dgpo_disliked.png", "blue")):
        Image.new("RGB", (640, 600), colour).save(comfy.base / "input" / name)


NEEDS: dict[str, Callable[[ComfyServer], None]] = {"gallery_preferences": pictures, "apply_lora": checkpoint}

# --- they run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("quickstart", *NATIVE)])
def test_the_workflow_runs(comfy: ComfyServer, name: str) -> None:
    NEEDS.get(name, lambda _: None)(comfy)
    graph = workflow(name)
    entry = comfy.run(graph)
    assert entry["status"]["status_str"] == "success"
    shown = {key for key, node in graph.items() if node["class_type"] in ("DGPO_LoRATrainer", "DGPO_BeforeAfter")}
    assert shown
    for key in shown:
        (picture,) = images({"outputs": {key: entry["outputs"][key]}})
        assert len(comfy.view(picture).convert("RGB").getcolors(2**24)) > 10
    saves = [key for key, node in graph.items() if node["class_type"] == "DGPO_SaveLoRA"]
    assert all(_saved(comfy, entry["outputs"][key]).is_file() for key in saves)


def test_the_quickstart_raises_the_reward(comfy: ComfyServer) -> None:
    """20 of its 40 iterations with fewer images: drawn from the same seeds, the prompts are met more often."""
    graph = workflow("quickstart")
    (compare,) = (key for key, node in graph.items() if node["class_type"] == "DGPO_BeforeAfter")
    graph["said"] = {"class_type": "PreviewAny", "inputs": {"source": [compare, 1]}}
    entry = comfy.run(graph)
    before, after = map(float, re.findall(r"([\d.]+) (?:before|after)", entry["outputs"]["said"]["text"][0]))
    assert after > before + 0.1
    (save,) = (key for key, node in graph.items() if node["class_type"] == "DGPO_SaveLoRA")
    assert _saved(comfy, entry["outputs"][save]).is_file()


@pytest.mark.parametrize("name", NATIVE)
def test_the_native_workflow_trains_and_its_lora_fits(small_comfy: ComfyServer, name: str) -> None:
    graph = workflow(name)
    if NEWER.get(name, "") not in ["", *_networks(small_comfy)]:
        pytest.skip("this ComfyUI does not know the model")
    (loader,) = (key for key, node in graph.items() if node["class_type"] == "DGPO_LoRALoader")
    graph["said"] = {"class_type": "PreviewAny", "inputs": {"source": [loader, 2]}}
    entry = small_comfy.run(graph)
    (applied,) = entry["outputs"]["said"]["text"]
    count, _, total = applied.split(" modules applied")[0].partition(" of ")
    assert count == total, applied
    by_kind = {node["class_type"]: key for key, node in graph.items()}
    assert _saved(small_comfy, entry["outputs"][by_kind["DGPO_SaveLoRA"]]).is_file()
    (picture,) = images({"outputs": {"": entry["outputs"][by_kind["DGPO_BeforeAfter"]]}})
    assert len(small_comfy.view(picture).convert("RGB").getcolors(2**24)) > 100


def test_the_lora_changes_what_the_checkpoint_draws(comfy: ComfyServer) -> None:
    checkpoint(comfy)
    graph = workflow("apply_lora")
    (loader,) = (node for node in graph.values() if node["class_type"] == "DGPO_LoRALoader")
    (save,) = (key for key, node in graph.items() if node["class_type"] == "SaveImage")
    drawn = []
    for strength in (0.0, 1.0):
        loader["inputs"]["strength_model"] = strength
        (picture,) = images({"outputs": {save: comfy.run(graph)["outputs"][save]}})
        drawn.append(comfy.view(picture).tobytes())
    assert drawn[0] != drawn[1]


def _saved(comfy: ComfyServer, output: dict[str, Any]) -> Path:
    return comfy.base / "output" / "loras" / output["text"][0]


def _networks(comfy: ComfyServer) -> list[str]:
    """The small models' files that are no whole checkpoints."""
    return [path.name for path in (comfy.base / "models" / "diffusion_models").iterdir()]
