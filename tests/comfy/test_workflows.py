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
from comfy_native_graphs import node as made
from comfy_server import REPO, ComfyServer, find_comfyui, images
from PIL import Image

API = REPO / "workflows" / "api"
NAMES = sorted(path.stem for path in API.glob("*.json"))
NATIVE = [name for name in NAMES if name.startswith("native_")]
NEWER = {  # by workflow of a model that an older ComfyUI does not know: its file
    "native_flux2_klein": "flux-2-klein-base-4b.safetensors",
    "native_flux2_klein_edit": "flux-2-klein-base-4b.safetensors",
    "native_zimage": "z_image_bf16.safetensors",
}
LLAMA = "comfy/text_encoders/llama_tokenizer/tokenizer.json"
"""Of ComfyUI's files; some checkouts lack it."""
SMALL_NATIVE: dict[str, dict[str, Any]] = {
    "DGPO_NativePolicy": {"rank": 4, "alpha": 8.0},
    "DGPO_Prompts": {"per_iteration": 1},
    "DGPO_SamplerSettings": {"group_size": 2, "height": 64, "width": 64},
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
    for node in graph.values():
        if node["inputs"].get("name") == "pickscore":  # it would have to be downloaded
            node["inputs"].update(name="brightness", weights_file="automatic")
    return graph


# --- what the workflows need -----------------------------------------------------------------------------------------


def pictures(comfy: ComfyServer) -> None:
    """One that is liked and one that is not, larger than the model's."""
    for name, colour in (("dgpo_liked.png", "red"), ("dgpo_disliked.png", "blue")):
        Image.new("RGB", (640, 600), colour).save(comfy.base / "input" / name)


def example(comfy: ComfyServer) -> None:
    """The picture that ComfyUI brings in its input folder, of whatever is in it."""
    drawn = Image.linear_gradient("L")
    Image.merge("RGB", (drawn, drawn.rotate(90), drawn.rotate(180))).save(comfy.base / "input" / "example.png")


NEEDS: dict[str, Callable[[ComfyServer], None]] = {
    "apply_lora": checkpoint,
    "gallery_preferences": pictures,
    "native_flux2_klein_edit": example,
}

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
    if why := _cannot_run(small_comfy, name):
        pytest.skip(why)
    NEEDS.get(name, lambda _: None)(small_comfy)
    graph = workflow(name)
    (loader,) = (key for key, node in graph.items() if node["class_type"] == "DGPO_LoRALoader")
    graph["said"] = {"class_type": "PreviewAny", "inputs": {"source": [loader, 2]}}
    entry = small_comfy.run(graph)
    (applied,) = entry["outputs"]["said"]["text"]
    count, _, total = applied.split(" modules applied")[0].partition(" of ")
    assert count == total, applied
    by_kind = {node["class_type"]: key for key, node in graph.items()}
    saved = entry["outputs"][by_kind["DGPO_SaveLoRA"]]
    assert _saved(small_comfy, saved).is_file()
    assert "lora key not loaded" not in _loaded(small_comfy, graph, saved["text"][0])
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


def _loaded(comfy: ComfyServer, graph: Graph, lora: str) -> str:
    """What ComfyUI prints while its own loader puts the LoRA on the graph's MODEL and its KSampler draws with it."""
    (applied,) = (node["inputs"] for node in graph.values() if node["class_type"] == "DGPO_LoRALoader")
    nodes = {
        "lora": made("LoraLoaderModelOnly", model=applied["model"], lora_name=lora, strength_model=1.0),
        "text": made("CLIPTextEncode", clip=applied["clip"], text="a lamp"),
        "latent": made("EmptyLatentImage", width=64, height=64, batch_size=1),
        "drawn": made(
            "KSampler", model=["lora", 0], positive=["text", 0], negative=["text", 0], latent_image=["latent", 0],
            seed=0, steps=1, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "kept": made("SaveLatent", samples=["drawn", 0], filename_prefix="dgpo"),
    }  # fmt: skip
    printed = len(comfy.log())
    comfy.run({**_before(graph, applied["model"][0], applied["clip"][0]), **nodes})
    return comfy.log()[printed:]


def _before(graph: Graph, *keys: str) -> Graph:
    """These nodes and all that they take something from."""
    found: Graph = {}
    for key in keys:
        found[key] = graph[key]
        found |= _before(graph, *(value[0] for value in graph[key]["inputs"].values() if isinstance(value, list)))
    return found


def _cannot_run(comfy: ComfyServer, name: str) -> str:
    """Why this ComfyUI cannot run a native workflow; "" where it can."""
    if NEWER.get(name, "") not in ["", *_networks(comfy)]:
        return "this ComfyUI does not know the model"
    root = find_comfyui()
    lacking = name == "native_hidream" and root is not None and not (root / LLAMA).is_file()
    return f"this ComfyUI lacks {LLAMA}" if lacking else ""


def _networks(comfy: ComfyServer) -> list[str]:
    """The small models' files that are no whole checkpoints."""
    return [path.name for path in (comfy.base / "models" / "diffusion_models").iterdir()]
