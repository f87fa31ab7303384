"""Every shared workflow in ComfyUI's real front end: it opens whole, and says what its API file says."""

from __future__ import annotations

import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from cards import CARDS
from comfy_browser import Browser
from comfy_server import REPO, ComfyServer
from PIL import Image

WORKFLOWS = REPO / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))

MODELS = (
    *("checkpoints/sd_v1-5", "checkpoints/v1-5-pruned-emaonly-fp16", "checkpoints/sd_xl_base_1.0"),
    *("checkpoints/sd3.5_medium_incl_clips_t5xxlfp8scaled", "diffusion_models/flux1-dev", "vae/ae"),
    *("text_encoders/clip_l", "text_encoders/t5xxl_fp16", "diffusion_models/Chroma1-HD"),
    *("diffusion_models/qwen_image_fp8_e4m3fn", "text_encoders/qwen_2.5_vl_7b_fp8_scaled", "vae/qwen_image_vae"),
    *("diffusion_models/z_image_bf16", "text_encoders/qwen_3_4b", "checkpoints/NoobAI-XL-Vpred-v1.0"),
    *("diffusion_models/flux-2-klein-base-4b", "vae/flux2-vae", "reward_models/PickScore_v1"),
    *("diffusion_models/hidream_i1_full_fp8", "text_encoders/clip_l_hidream", "text_encoders/clip_g_hidream"),
    *("text_encoders/t5xxl_fp8_e4m3fn_scaled", "text_encoders/llama_3.1_8b_instruct_fp8_scaled"),
    *("diffusion_models/wan2.1_t2v_1.3B_fp16", "text_encoders/umt5_xxl_fp8_e4m3fn_scaled", "vae/wan_2.1_vae"),
)

PUBLISHED_AS = {"PickScore_v1.safetensors": "yuvalkirstain/PickScore_v1/resolve/main/model.safetensors"}
"""Files that say nothing by their name on the hub, and that nobody else has under another one."""

RECTANGLES = """() => app.graph.nodes.map(node => {
    const shown = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect()
    const { scale, offset } = app.canvas.ds, { left, top } = app.canvas.canvas.getBoundingClientRect()
    const places = shown && [(shown.left - left) / scale - offset[0], (shown.top - top) / scale - offset[1]]
    const drawn = shown ? [...places, shown.width / scale, shown.height / scale] : [...node.boundingRect]
    return [`${node.id} ${node.type}`, drawn]
})"""
HTML = "() => document.querySelectorAll('[data-node-id]').length"

Rectangle = list[float]  # left, top, width and height on the graph


def overlap(one: Rectangle, other: Rectangle, spare: float = 1) -> bool:
    """Whether they share more than `spare` pixels in both directions."""
    ends = [min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    return min(ends) > spare


def holds(box: Rectangle, one: Rectangle, spare: float = 1) -> bool:
    return all(box[i] <= one[i] + spare and one[i] + one[i + 2] <= box[i] + box[i + 2] + spare for i in (0, 1))


def without_meta(prompt: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes without ids and titles, links by the class of the node they come from."""

    def plain(value: Any) -> Any:
        return [prompt[value[0]]["class_type"], value[1]] if isinstance(value, list) else value

    nodes = [
        {"class_type": node["class_type"], "inputs": {k: plain(v) for k, v in node["inputs"].items()}}
        for node in prompt.values()
    ]
    return sorted(nodes, key=lambda node: json.dumps(node, sort_keys=True))


@pytest.fixture
def files(comfy: ComfyServer) -> None:
    """What the workflows name and a fresh ComfyUI does not have."""
    for name, colour in (("dgpo_liked.png", "red"), ("dgpo_disliked.png", "blue"), ("example.png", "green")):
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), colour).save(picture, "PNG")
        (comfy.base / "input" / name).write_bytes(picture.getvalue())
    for name in MODELS:
        model = comfy.base / "models" / f"{name}.safetensors"
        model.parent.mkdir(parents=True, exist_ok=True)
        model.touch()  # opened by nobody here: the front end only asks whether it is there


def test_there_is_a_workflow_and_a_thumbnail_for_each_api_file() -> None:
    assert sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json")) == NAMES
    assert sorted(path.stem for path in WORKFLOWS.glob("*.jpg")) == sorted(CARDS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_opens_without_a_red_node_or_an_error(
    name: str, comfy: ComfyServer, files: None, browser: Browser, tmp_path: Path
) -> None:
    browser.load_workflow(json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8")))
    browser.fit()
    browser.screenshot(Path(os.environ.get("DGPO_SCREENSHOTS", tmp_path)) / f"{name}.png")
    assert browser.missing_nodes() == []
    assert browser.red_nodes() == []
    assert browser.errors() == []
    api = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text("utf-8"))
    assert without_meta(browser.to_api()) == without_meta(api)


@pytest.mark.parametrize("renderer", ["classic", "newer"])
def test_no_node_lies_over_another_or_leaves_its_box(
    renderer: str, comfy: ComfyServer, files: None, browser: Browser
) -> None:
    """Else: TALLER in tests/helpers/ui_workflow.py, for nodes that need more room in Nodes 2.0."""
    faults = []
    try:
        browser.set_setting("Comfy.VueNodes.Enabled", renderer == "newer")
        for name in NAMES:
            workflow = json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))
            browser.load_workflow(workflow)
            browser.fit()
            if renderer == "newer" and not browser.evaluate(HTML):
                pytest.skip("This front end draws nodes on the canvas only.")
            nodes = browser.evaluate(RECTANGLES)
            boxes = [(group["title"], group["bounding"]) for group in workflow["groups"]]
            faults += [
                f"{name}: {one} {at} lies over {other} {there}"
                for (one, at), (other, there) in itertools.combinations(nodes, 2)
                if overlap(at, there)
            ]
            faults += [
                f"{name}: {node} {at} leaves {title} {box}"
                for node, at in nodes
                for title, box in boxes
                if overlap(at, box) and not holds(box, at)
            ]
    finally:
        browser.set_setting("Comfy.VueNodes.Enabled", False)
    assert faults == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("native_")])
def test_a_native_workflow_says_where_its_files_are_to_be_had(name: str) -> None:
    nodes = json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))["nodes"]
    loaded = {value for node in nodes for value in _texts(node["widgets_values"]) if value.endswith(".safetensors")}
    offered = [model for node in nodes for model in node["properties"].get("models", ())]
    assert {model["name"] for model in offered} == loaded
    for model in offered:
        assert model["url"].startswith("https://huggingface.co/")
        assert model["url"].endswith(f"/{PUBLISHED_AS.get(model['name'], model['name'])}")
        assert f"{model['directory']}/{model['name'].removesuffix('.safetensors')}" in MODELS


@pytest.mark.parametrize("form", ["none", "file", "folder"])
def test_the_front_end_offers_a_rewards_weights_where_they_are_missing(
    form: str, comfy: ComfyServer, files: None, browser: Browser
) -> None:
    """The rewards do without the file: they find a folder, or download it themselves."""
    weights = comfy.base / "models" / "reward_models" / "PickScore_v1.safetensors"
    folder = weights.with_suffix("")
    try:
        if form != "file":
            weights.unlink()
        if form == "folder":
            folder.mkdir()
        browser.open(comfy)
        browser.load_workflow(json.loads((WORKFLOWS / "native_sd15.json").read_text("utf-8")))
        browser.page.wait_for_timeout(1500)
        said = " ".join(browser.dialogs())
    finally:
        weights.touch()
        if folder.is_dir():
            folder.rmdir()
    if form == "folder" and "Don't show this again" in said:
        pytest.skip("This front end looks at files alone, not at what the node offers.")
    assert ("PickScore_v1.safetensors" in said) == (form == "none")


CHOOSE = """([name, value]) => {
    const node = app.graph.nodes.find(({ type }) => type === 'DGPO_Reward')
    const widget = node.widgets.find(widget => widget.name === name)
    widget.setValue(value, { e: new PointerEvent('pointerup'), node, canvas: app.canvas })
}"""
CHOSEN = """() => app.graph.nodes.find(({ type }) => type === 'DGPO_Reward')
    .widgets.filter(({ name }) => ['name', 'weights_file'].includes(name)).map(({ value }) => value)"""


@pytest.mark.parametrize("form", ["ui", "api"])
def test_another_reward_lets_the_file_of_the_one_before_go(
    form: str, comfy: ComfyServer, files: None, browser: Browser
) -> None:
    text = (WORKFLOWS / ("api" if form == "api" else "") / "native_sd15.json").read_text("utf-8")
    (browser.load_api if form == "api" else browser.load_workflow)(json.loads(text))
    assert browser.evaluate(CHOSEN) == ["pickscore", "PickScore_v1.safetensors"]
    browser.evaluate(CHOOSE, ["name", "brightness"])
    assert browser.evaluate(CHOSEN) == ["brightness", "automatic"]
    browser.evaluate(CHOOSE, ["weights_file", "PickScore_v1.safetensors"])
    browser.evaluate(CHOOSE, ["name", "pickscore"])
    assert browser.evaluate(CHOSEN) == ["pickscore", "automatic"]


def _texts(values: Any) -> list[str]:
    values = values.values() if isinstance(values, dict) else values
    return [value for value in values if isinstance(value, str)]


def test_comfyui_offers_every_workflow_as_a_template(comfy: ComfyServer) -> None:
    offered = comfy.get("/workflow_templates")
    assert sorted(offered["dgpo"]) == NAMES
    assert offered["dgpo"][0] == "start_here"
    for name in NAMES:
        assert comfy.get(f"/api/workflow_templates/dgpo/{name}.json")["nodes"]
