"""The blueprints in a real ComfyUI: in the node library, on an empty graph, and run there.

DGPO_SCREENSHOTS: a folder for pictures of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import blueprint
import pytest
from comfy_browser import EMPTY, Browser
from comfy_checkpoint import checkpoint
from comfy_results import tensors
from comfy_server import ComfyServer, RequestFailed, images

NAMES = sorted(blueprint.BLUEPRINTS)
LOOP, COMPARE = "DGPO Training Loop", "DGPO Compare Before and After"
VALUES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
KINDS = ("required", "optional")
LIBRARY = '[aria-label^="Node Library"]'
WIDGETS = """values => { const node = app.graph.nodes.find(node => node.isSubgraphNode?.())
    for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find(widget => widget.name === name)
        widget.value = value
        widget.callback?.(value)
    } }"""
CONNECT = """names => { const node = app.graph.nodes.find(node => node.isSubgraphNode?.())
    const loader = LiteGraph.createNode('CheckpointLoaderSimple')
    app.graph.add(loader)
    loader.widgets[0].value = 'sd_v1-5.safetensors'  // other tests leave more
    names.forEach((name, place) => loader.connect(place, node, node.findInputSlot(name))) }"""
PICTURE = "[data-node-id] img"
SMALL = {"iterations": 2, "text": "a red circle\na blue square"}


@pytest.fixture(scope="module")
def offered(comfy: ComfyServer) -> dict[str, str]:
    """The ids of the pack's blueprints, by name, in ComfyUI's list."""
    try:
        listed = comfy.get("/global_subgraphs")
    except RequestFailed:
        pytest.skip("This ComfyUI offers no blueprints of packs.")
    return {entry["name"]: id_ for id_, entry in listed.items() if entry["info"]["node_pack"] == "custom_nodes.dgpo"}


@pytest.fixture
def model(comfy: ComfyServer) -> None:
    """A checkpoint and a LoRA that the front end finds when it is opened."""
    checkpoint(comfy)


def widgets_of(node: dict[str, Any]) -> int:
    """How many values a node stores, by what the server says of it."""
    specs = [spec for kind in KINDS for spec in node["input"].get(kind, {}).values()]
    shown = [spec for spec in specs if isinstance(spec[0], list) or spec[0] in VALUES]
    assert not any(len(spec) > 1 and spec[1].get("control_after_generate") for spec in shown)
    return len(shown)


def test_every_blueprint_is_offered(comfy: ComfyServer, offered: dict[str, str]) -> None:
    assert sorted(offered) == NAMES
    for name, id_ in offered.items():
        assert json.loads(comfy.get(f"/global_subgraphs/{id_}")["data"]) == blueprint.made(name)


@pytest.mark.parametrize("name", NAMES)
def test_its_nodes_are_those_of_the_server(comfy: ComfyServer, name: str) -> None:
    known = comfy.object_info()
    (definition,) = blueprint.made(name)["definitions"]["subgraphs"]
    for node in definition["nodes"]:
        assert len(node["widgets_values"]) == widgets_of(known[node["type"]]), node["type"]
        taken = {name for kind in KINDS for name in known[node["type"]]["input"].get(kind, {})}
        assert {input_["name"] for input_ in node["inputs"]} == taken


def put(browser: Browser, name: str) -> None:
    """From the node library onto the graph, as a person does."""
    page = browser.page
    page.locator(LIBRARY).first.click()
    page.get_by_placeholder("Search").first.fill(name)
    page.wait_for_timeout(1000)
    page.get_by_text(name).first.click()
    page.wait_for_timeout(500)
    page.mouse.move(900, 300)
    page.mouse.click(900, 130)
    page.wait_for_timeout(1000)
    page.locator(LIBRARY).first.click()
    page.wait_for_timeout(500)


def screenshot(browser: Browser, folder: Path, name: str) -> None:
    browser.page.wait_for_timeout(2000)
    browser.screenshot(Path(os.environ.get("DGPO_SCREENSHOTS", folder)) / f"blueprint_{name}.png")


@pytest.mark.parametrize(("renderer", "groups"), [("classic", 8), ("newer", 9)])  # else the second one is reused
def test_the_loop_alone_on_an_empty_graph_trains_a_lora(
    comfy: ComfyServer, offered: dict[str, str], browser: Browser, renderer: str, groups: int, tmp_path: Path
) -> None:
    try:
        browser.set_setting("Comfy.VueNodes.Enabled", renderer == "newer")
        browser.load_workflow(EMPTY)
        put(browser, LOOP)
        assert browser.evaluate("() => app.graph.nodes.map(node => node.title)") == [LOOP]
        browser.evaluate(
            WIDGETS, {**SMALL, "group_size": groups, "run": f"blueprint_{renderer}", "save_as": f"dgpo/{renderer}"}
        )
        (prompt,) = browser.queue()
        entry = comfy.wait(prompt)
        screenshot(browser, tmp_path, f"loop_{renderer}")
        (saved,) = (out["text"][0] for out in entry["outputs"].values() if "images" not in out)
        assert saved.startswith(f"dgpo/{renderer}")
        assert tensors((comfy.base / "output" / "loras" / saved).read_bytes())
        if renderer == "newer":
            assert browser.page.locator(PICTURE).count() == 1  # the classic one draws it inside alone
        assert browser.red_nodes() == []
        assert browser.errors() == []
    finally:
        browser.set_setting("Comfy.VueNodes.Enabled", False)


def test_the_comparison_draws_with_and_without_a_lora(
    comfy: ComfyServer, offered: dict[str, str], model: None, browser: Browser, tmp_path: Path
) -> None:
    browser.load_workflow(EMPTY)
    put(browser, COMPARE)
    browser.evaluate(CONNECT, ["model", "clip", "vae"])
    small = {"steps": 2, "width": 64, "height": 64, "first": 1, "images": 1}
    browser.evaluate(WIDGETS, {**small, "lora_name": "test_workflows.safetensors"})
    (prompt,) = browser.queue()
    entry = comfy.wait(prompt)
    screenshot(browser, tmp_path, "compare")
    (output,) = (out for out in entry["outputs"].values() if "before" in out)
    before, after = (
        comfy.view(next(images({"outputs": {"": {"images": output[side]}}}))) for side in ("before", "after")
    )
    assert before.tobytes() != after.tobytes()
    assert browser.red_nodes() == []
    assert browser.errors() == []
