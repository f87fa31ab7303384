"""Makes the workflows that the front end opens from those in API format:
`python tests/helpers/ui_workflow.py [name ...]`.

workflows/api/<name>.json gives workflows/<name>.json. ComfyUI's real front end builds the nodes; this lays them out,
boxed by group, in columns by depth. Run it with the oldest ComfyUI that is supported: newer ones open its files, too.
A node of the API file may say more in its `_meta`, which ComfyUI ignores when the file is queued as it is:
    title    the node's title
    group    the name of the box around it; boxes stand in the order of their names
    size     width and height, such as [520, 700]
    room     pixels that stay free below it, for what it shows once it has run
    note     Markdown that is shown below it; with "note_before": true, to the left of its group
    models   the files that it loads: [{"name": ..., "url": ..., "directory": ...}], which ComfyUI offers to download
    control  what follows a run: "fixed" (the default), "increment", "decrement" or "randomize"
"""

from __future__ import annotations

import argparse
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_browser import Browser
from comfy_server import REPO, ComfyServer

WORKFLOWS = REPO / "workflows"
GAP = 60  # between nodes
TITLE = 30  # a node's title is above its position
BOX = {"margin": 30, "title": 50, "colour": "#3f789e"}
VIEW = {"scale": 1, "offset": [95, 140]}  # right of the front end's bar, below its buttons
SCREEN = (1440, 900)  # pixels
NOTE = {"width": 360, "letters": 46, "line": 20, "colours": {"color": "#432", "bgcolor": "#653"}}
NARROWEST = 225  # pixels, in Nodes 2.0
TALLER = {  # in Nodes 2.0 (front end 1.49.6) than on the canvas: pixels below the title, to leave room for
    "CheckpointLoaderSimple": 102,
    "CLIPLoader": 114,
    "DGPO_BeforeAfter": 366,
    "DGPO_GroupSampler": 126,
    "DGPO_HumanRanker": 314,
    "DGPO_LoRALoader": 182,
    "DGPO_Reward": 186,
    "DGPO_SamplerSettings": 342,
    "DualCLIPLoader": 142,
    "EmptyLatentImage": 118,
    "ImageBatch": 78,
    "ImageScale": 142,
    "ImageToMask": 62,
    "LoadImage": 322,
    "ModelSamplingAuraFlow": 62,
    "ModelSamplingSD3": 62,
    "PreviewImage": 34,
    "QuadrupleCLIPLoader": 142,
    "SaveImage": 70,
    "UNETLoader": 86,
    "VAEDecode": 54,
    "VAELoader": 62,
}
SET_CONTROLS = """controls => {
    for (const node of app.graph.nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name === 'control_after_generate') widget.value = controls[node.id] ?? 'fixed'
}"""

Prompt = Mapping[str, Mapping[str, Any]]
Columns = list[list[dict[str, Any]]]


def numbered(prompt: Prompt) -> dict[str, dict[str, Any]]:
    """The same graph with the node ids 1, 2, ..., as the front end has them."""
    numbers = {id_: str(number) for number, id_ in enumerate(prompt, 1)}

    def linked(value: Any) -> Any:
        is_link = isinstance(value, list) and len(value) == 2 and value[0] in numbers
        return [numbers[value[0]], value[1]] if is_link else value

    return {
        numbers[id_]: {**node, "inputs": {name: linked(value) for name, value in node["inputs"].items()}}
        for id_, node in prompt.items()
    }


def build(browser: Browser, prompt: Prompt) -> dict[str, Any]:
    """The workflow in the front end's format; raises ValueError where the front end changed a value."""
    prompt = numbered(prompt)
    meta = {id_: node.get("_meta", {}) for id_, node in prompt.items()}
    browser.load_api(prompt)
    browser.evaluate(SET_CONTROLS, {id_: more["control"] for id_, more in meta.items() if "control" in more})
    workflow = browser.serialize()
    arrange(workflow, meta, _links(prompt))
    browser.load_workflow(workflow)
    if browser.missing_nodes():
        raise ValueError(f"The server lacks these nodes: {', '.join(browser.missing_nodes())}.")
    _require_same(prompt, browser.to_api())
    workflow = browser.serialize()
    workflow.get("extra", {}).pop("ds", None)  # the view; without it the front end shows the whole graph
    if fits_at_full_size(workflow):
        workflow.setdefault("extra", {})["ds"] = VIEW
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(prompt, sort_keys=True)))
    return workflow


def fits_at_full_size(workflow: Mapping[str, Any]) -> bool:
    """Whether all of it can be read on a small screen without zooming."""
    boxes = [group["bounding"] for group in workflow["groups"]]
    if not boxes:
        return False
    right = max(box[0] + box[2] for box in boxes)
    bottom = max(node["pos"][1] + node["size"][1] for node in workflow["nodes"]) + BOX["margin"]
    return right + VIEW["offset"][0] <= SCREEN[0] and bottom + VIEW["offset"][1] <= SCREEN[1]


def _links(prompt: Prompt) -> dict[str, list[str]]:
    """The nodes that each node takes inputs from."""
    return {
        id_: [value[0] for value in node["inputs"].values() if isinstance(value, list) and value and value[0] in prompt]
        for id_, node in prompt.items()
    }


def _require_same(prompt: Prompt, shown: Prompt) -> None:
    for id_, node in prompt.items():
        for name, value in node["inputs"].items():
            found = shown[id_]["inputs"].get(name)
            if found != value:
                raise ValueError(
                    f"{node['class_type']} has {name} = {value!r}, but the front end made {found!r} of it."
                )


def arrange(
    workflow: dict[str, Any], meta: Mapping[str, Mapping[str, Any]], links: Mapping[str, Sequence[str]]
) -> None:
    """Places the groups from left to right, each with its nodes in columns, and adds the boxes and notes."""
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    overall = depths(links)
    for id_, node in nodes.items():
        width, height = meta[id_].get("size", node["size"])
        node["size"] = [max(width, NARROWEST), max(height, TALLER.get(node["type"], 0))]
        if "models" in meta[id_]:
            node["properties"]["models"] = meta[id_]["models"]
    names = sorted({more.get("group", "") for more in meta.values()})  # they are numbered
    x = 0.0
    for name in names:
        members = [id_ for id_ in nodes if meta[id_].get("group", "") == name]
        inner = depths({id_: [source for source in links[id_] if source in members] for id_ in members})
        columns: Columns = [[] for _ in range(max(inner.values()) + 1)]
        for id_ in sorted(members, key=lambda id_: (overall[id_], int(id_))):
            notes = _notes(workflow, meta[id_])
            before = notes if meta[id_].get("note_before") else []
            columns[inner[id_]] += [nodes[id_], *([] if before else notes)]
            columns = [*([before] if before else []), *columns]
        width, height = _place(columns, x, {int(id_): meta[id_].get("room", 0) for id_ in members})
        if name:
            workflow["groups"].append(_box(len(workflow["groups"]) + 1, name, x, width, height))
        x += width + 2 * BOX["margin"] + GAP


def depths(links: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The column of each node: after all its sources; a node without sources just before the first that takes it."""
    found: dict[str, int] = {}

    def depth(id_: str) -> int:
        if id_ not in found:
            found[id_] = max((depth(source) + 1 for source in links[id_]), default=0)
        return found[id_]

    for id_ in links:
        depth(id_)
    for id_, sources in links.items():
        takers = [found[taker] for taker, its_sources in links.items() if id_ in its_sources]
        if not sources and takers:
            found[id_] = min(takers) - 1
    return found


def _notes(workflow: dict[str, Any], meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The note of a node, added to the workflow; none where it has none."""
    if "note" not in meta:
        return []
    workflow["last_node_id"] += 1
    letters = NOTE["letters"] * meta.get("note_width", NOTE["width"]) / NOTE["width"]
    lines = sum(max(1, math.ceil(len(line) / letters)) for line in meta["note"].splitlines())
    note = {
        "id": workflow["last_node_id"],
        "type": "MarkdownNote",
        "size": [meta.get("note_width", NOTE["width"]), 60 + NOTE["line"] * lines],
        "flags": {},
        "order": len(workflow["nodes"]),
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [meta["note"]],
        **NOTE["colours"],
    }
    workflow["nodes"].append(note)
    return [note]


def _place(columns: Columns, left: float, rooms: Mapping[int, float]) -> tuple[float, float]:
    """Sets the positions and returns the width and height that are taken. rooms: to be left free, by id."""
    x, bottom = left, 0.0
    for column in columns:
        y = float(TITLE)
        for node in column:
            node["pos"] = [round(x), round(y)]
            y += node["size"][1] + rooms.get(int(node["id"]), 0) + GAP
        bottom = max(bottom, y - GAP)
        x += max((node["size"][0] for node in column), default=0) + GAP
    return x - GAP - left, bottom


def _box(number: int, title: str, x: float, width: float, height: float) -> dict[str, Any]:
    margin = BOX["margin"]
    bounding = [x - margin, -BOX["title"], width + 2 * margin, height + BOX["title"] + margin]
    return {
        "id": number,
        "title": title,
        "bounding": [round(value) for value in bounding],
        "color": BOX["colour"],
        "font_size": 24,
        "flags": {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="workflows by name; all without one")
    names = parser.parse_args().names or sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    with ComfyServer() as server, Browser() as browser:
        browser.open(server)
        for name in names:
            prompt = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text("utf-8"))
            text = json.dumps(build(browser, prompt), indent=2, ensure_ascii=False)
            (WORKFLOWS / f"{name}.json").write_text(f"{text}\n", "utf-8")
            print(f"workflows/{name}.json")


if __name__ == "__main__":
    main()
