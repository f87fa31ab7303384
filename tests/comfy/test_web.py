"""What the pack's scripts put on nodes, in the real front end, where the front end does something of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from comfy_browser import EMPTY, Browser
from comfy_server import REPO

HTML = "() => document.querySelectorAll('[data-node-id]').length"
NODE = "type => app.graph.nodes.find(node => node.type === type)"
EXECUTED = "details => details.forEach(detail => app.api.dispatchCustomEvent('executed', detail))"
SHOWN = f"""() => {{ const find = {NODE}
    return [find('DGPO_SaveLoRA').widgets.find(({{ name }}) => name === 'said')?.value,
        find('DGPO_BeforeAfter').widgets.filter(({{ name }}) => name === 'compare').length,
        document.querySelector('.dgpo-compare .turn span')?.textContent] }}"""
RETITLE = f"""() => {{ ({NODE})('DGPO_Teach').title = 'changed'
    app.extensionManager.workflow.activeWorkflow.changeTracker.checkState() }}"""
INTO_SUBGRAPH = """async () => {
    app.canvas.selectItems(app.graph.nodes.filter(({ type }) => type.startsWith('DGPO_')))
    await app.extensionManager.command.execute('Comfy.Graph.ConvertToSubgraph')
    const around = app.graph.nodes.find(node => node.isSubgraphNode?.())
    return [around.id, Object.fromEntries(around.subgraph.nodes.map(({ id, type }) => [type, id]))] }"""
COMMAND = "async name => { await app.extensionManager.command.execute(name) }"
SOURCE = f"""value => {{ const widget = ({NODE})('DGPO_Teach').widgets.find(({{ name }}) => name === 'source')
    widget.value = value; widget.callback(value) }}"""
BOTTOMS = f"""() => {{ const {{ pos, size }} = ({NODE})('DGPO_BeforeAfter'), box = app.graph.groups.at(-1)
    return [pos[1] + size[1], box.pos[1] + box.size[1]] }}"""
IDS = {"DGPO_SaveLoRA": "2", "DGPO_BeforeAfter": "3"}
SAVED = "Saved as output/loras/dgpo/teach_00007.safetensors"
BOXES = """() => [...document.querySelectorAll('textarea')].filter(one => one.offsetParent)
    .filter(one => one.value.startsWith('a red circle')).map(one => one.readOnly)"""


@pytest.fixture(params=["classic", "newer"])
def page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Browser]:
    """The template, drawn on the canvas or as Nodes 2.0."""
    browser.set_setting("Comfy.VueNodes.Enabled", request.param == "newer")
    try:
        browser.load_workflow(json.loads((REPO / "workflows" / "start_here.json").read_text("utf-8")))
        if request.param == "newer" and not browser.evaluate(HTML):
            pytest.skip("This front end draws nodes on the canvas only.")
        yield browser
    finally:
        browser.set_setting("Comfy.VueNodes.Enabled", False)


def outputs(ids: Mapping[str, str] = IDS) -> list[dict[str, Any]]:
    """What ComfyUI would send of a run: a saved file, and two pictures. ids: of the nodes."""
    picture = {"filename": "none.png", "subfolder": "", "type": "temp"}
    compared = {"before": [picture], "after": [picture], "captions": ["a red circle (seed 5)"]}
    said = {"DGPO_SaveLoRA": {"text": ["dgpo/teach_00007.safetensors"]}, "DGPO_BeforeAfter": compared}
    return [{"node": id_, "output": said[kind], "prompt_id": "none"} for kind, id_ in ids.items()]


def test_what_a_run_has_said_comes_back_after_an_undo_and_in_a_tab_that_is_opened_again(page: Browser) -> None:
    page.evaluate(EXECUTED, outputs())
    page.page.wait_for_timeout(500)
    shown = [SAVED, 1, "1 of 1: a red circle (seed 5)"]
    assert page.evaluate(SHOWN) == shown
    if page.evaluate("() => !LiteGraph.vueNodesMode"):  # Nodes 2.0 has the template's room for the same
        bottom, box = page.evaluate(BOTTOMS)
        assert bottom <= box
    page.evaluate(RETITLE)
    page.evaluate(COMMAND, "Comfy.Undo")
    page.page.wait_for_timeout(1500)
    assert page.evaluate(f"() => ({NODE})('DGPO_Teach').title") != "changed"
    assert page.evaluate(SHOWN) == shown
    page.evaluate(COMMAND, "Comfy.NewBlankWorkflow")
    page.page.wait_for_timeout(1000)
    page.evaluate(COMMAND, "Workspace.PreviousOpenedWorkflow")
    page.page.wait_for_timeout(1500)
    if page.evaluate("() => Object.keys(app.nodeOutputs).length"):  # 1.27 keeps those of prompts of its own alone
        assert page.evaluate(SHOWN) == shown
    page.load_workflow(EMPTY)
    assert page.errors([r"view\?"]) == []


def test_what_a_node_in_a_subgraph_shows_lies_over_no_other_graph(page: Browser) -> None:
    around, inside = page.evaluate(INTO_SUBGRAPH)
    page.evaluate(EXECUTED, outputs({kind: f"{around}:{inside[kind]}" for kind in IDS}))
    page.page.wait_for_timeout(500)
    assert not page.page.locator(".dgpo-compare").is_visible()
    page.evaluate("() => app.canvas.setGraph(app.graph.nodes.find(node => node.isSubgraphNode?.()).subgraph)")
    page.page.wait_for_timeout(500)
    assert page.page.locator(".dgpo-compare").is_visible()
    assert page.evaluate(SHOWN.replace("app.graph", "app.canvas.graph"))[0] == SAVED
    page.evaluate("() => app.canvas.setGraph(app.rootGraph ?? app.graph)")
    page.page.wait_for_timeout(500)
    assert not page.page.locator(".dgpo-compare").is_visible()


def test_a_text_that_is_not_the_source_cannot_be_written_into(page: Browser) -> None:
    assert page.evaluate(BOXES) == [True]
    page.evaluate(SOURCE, "the text below")
    page.page.wait_for_timeout(300)
    assert page.evaluate(BOXES) == [False]
    page.evaluate(SOURCE, "embedded")
    page.page.wait_for_timeout(300)
    assert page.evaluate(BOXES) == [True]
    page.set_setting("Comfy.VueNodes.Enabled", False)  # on the canvas a box that is disabled would vanish
    assert page.evaluate(BOXES) == [True]
