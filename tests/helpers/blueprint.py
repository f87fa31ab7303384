"""Makes the blueprints that ComfyUI's node library offers, out of the templates: `python tests/helpers/blueprint.py`.

A blueprint is one subgraph that a person puts into a graph of their own: some nodes of workflows/<template>.json (make
those first where a node's widgets have changed: `ui_workflow.py`), a few of whose inputs are on the subgraph itself.
It needs no ComfyUI.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ui_workflow

REPO = Path(__file__).resolve().parents[2]
SUBGRAPHS = REPO / "subgraphs"
CATEGORY = "DGPO"
INPUTS, OUTPUTS = -10, -20  # the front end's ids of the two places where a subgraph's own inputs and outputs end
PICTURES = "$$canvas-image-preview"  # what the front end calls the pictures of a node
SLOT, TITLE = 20, 48  # pixels of such a place: each input's, and those above the first


@dataclass(frozen=True)
class Blueprint:
    """What of a template is kept, and what of it is seen from outside.

    nodes: their ids in the template
    inputs: by name, the inputs of nodes that get it, as "id.input"; sockets as well as widgets
    outputs: by name, the output of a node, as "id.output"
    labels: what an input is called on the screen where its node calls it otherwise
    values: what widgets hold in place of the template's values
    pictures: the node whose pictures the subgraph shows, as far as the front end does (in Nodes 2.0)
    """

    template: str
    says: str
    nodes: tuple[int, ...]
    inputs: Mapping[str, tuple[str, ...]]
    outputs: Mapping[str, str]
    pictures: int
    labels: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


BLUEPRINTS = {
    "DGPO Training Loop": Blueprint(
        "quickstart",
        "Trains a LoRA by a reward and saves it: model, prompts, sampler, reward, settings and Training Loop in one "
        "node. As it is it trains the embedded model, without a download.",
        nodes=(1, 2, 3, 4, 5, 6, 7),
        inputs={
            "model": ("1.model",),
            "run": ("1.run",),
            "source": ("2.source",),
            "text": ("2.text",),
            "steps": ("3.steps",),
            "cfg": ("3.cfg",),
            "group_size": ("3.group_size",),
            "reward": ("4.name",),
            "preset": ("5.preset",),
            "iterations": ("6.iterations",),
            "save_as": ("7.name",),
        },
        outputs={
            "lora": "6.lora",
            "policy": "6.policy",
            "prompts": "2.prompts",
            "settings": "3.settings",
            "reward": "4.reward",
            "curve": "6.curve",
        },
        pictures=6,
        labels={"save_as": "save LoRA as"},
        values={"1.run": "blueprint", "7.name": "dgpo/blueprint"},
    ),
    "DGPO Compare Before and After": Blueprint(
        "apply_lora",
        "Applies a LoRA to a MODEL, and draws the same prompts and seeds without and with it, under a slider.",
        nodes=(2, 3, 4, 5),
        inputs={
            "model": ("2.model", "5.model_before"),
            "clip": ("2.clip", "5.clip"),
            "vae": ("5.vae",),
            "lora": ("2.lora",),
            "lora_name": ("2.lora_name",),
            "strength": ("2.strength_model",),
            "text": ("3.text",),
            "negative_prompt": ("4.negative_prompt",),
            "steps": ("4.steps",),
            "cfg": ("4.cfg",),
            "width": ("4.width",),
            "height": ("4.height",),
            "sampler": ("5.sampler",),
            "scheduler": ("5.scheduler",),
            "first": ("5.first",),
            "images": ("5.images",),
            "first_seed": ("5.first_seed",),
        },
        outputs={"model": "2.model", "clip": "2.clip", "info": "2.info", "grid": "5.grid"},
        pictures=5,
    ),
}


def made(name: str) -> dict[str, Any]:
    """The file of a blueprint, as the front end reads it: a graph of one node, and the subgraph that it stands for."""
    blueprint, id_ = BLUEPRINTS[name], _uuid(name)
    subgraph = _Subgraph(blueprint, id_)
    inputs = [subgraph.input(name_, targets) for name_, targets in blueprint.inputs.items()]
    outputs = [subgraph.output(name_, source) for name_, source in blueprint.outputs.items()]
    nodes = list(subgraph.nodes.values())
    definition = {
        "id": id_,
        "version": 1,
        "state": {
            "lastGroupId": 0,
            "lastNodeId": max(subgraph.nodes),
            "lastLinkId": len(subgraph.links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": name,
        "inputNode": _place(INPUTS, nodes, len(inputs)),
        "outputNode": _place(OUTPUTS, nodes, len(outputs)),
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": nodes,
        "groups": [],
        "links": subgraph.links,
        "extra": {},
        "category": CATEGORY,
        "description": blueprint.says,
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [_instance(definition, subgraph.widgets, blueprint.pictures)],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [definition]},
        "extra": {},
    }


class _Subgraph:
    """Nodes and links while inputs and outputs are added; `widgets` are the inputs that a person fills in."""

    def __init__(self, blueprint: Blueprint, id_: str) -> None:
        path = REPO / "workflows" / f"{blueprint.template}.json"
        workflow = json.loads(path.read_text("utf-8"))
        self._id, self._labels = id_, blueprint.labels
        self.nodes = {node["id"]: node for node in workflow["nodes"] if node["id"] in blueprint.nodes}
        self.links: list[dict[str, Any]] = []
        self.widgets: set[str] = set()
        for node in self.nodes.values():
            self._cut(node)
        for _, origin, slot, target, place, type_ in workflow["links"]:
            if origin in self.nodes and target in self.nodes:
                self._link(origin, slot, target, place, type_)
        self._lay_out()
        for where, value in blueprint.values.items():
            node, name = self._find(where)
            widgets = [input_["name"] for input_ in node["inputs"] if "widget" in input_]
            if len(widgets) != len(node["widgets_values"]):
                raise ValueError(f"{node['type']} has values of its own besides its inputs: which one is {name}?")
            node["widgets_values"][widgets.index(name)] = value

    def _cut(self, node: dict[str, Any]) -> None:
        for input_ in node["inputs"]:
            input_["link"] = None
        for output in node["outputs"]:
            output["links"] = []

    def _lay_out(self) -> None:
        names = {str(id_): id_ for id_ in self.nodes}
        sources = {name: [str(x["origin_id"]) for x in self.links if x["target_id"] == names[name]] for name in names}
        graph = {"nodes": list(self.nodes.values()), "groups": []}
        ui_workflow.arrange(graph, {name: {} for name in names}, sources)

    def _link(self, origin: int, slot: int, target: int, place: int, type_: str) -> int:
        id_ = len(self.links) + 1
        self.links.append(
            {
                "id": id_,
                "origin_id": origin,
                "origin_slot": slot,
                "target_id": target,
                "target_slot": place,
                "type": type_,
            }
        )
        if target in self.nodes:
            self.nodes[target]["inputs"][place]["link"] = id_
        if origin in self.nodes:
            self.nodes[origin]["outputs"][slot]["links"].append(id_)
        return id_

    def _find(self, where: str) -> tuple[dict[str, Any], str]:
        id_, _, name = where.partition(".")
        return self.nodes[int(id_)], name

    def input(self, name: str, targets: tuple[str, ...]) -> dict[str, Any]:
        """One more input of the subgraph, linked to those of its nodes; they are added in the order of their slots."""
        slot = len({link["origin_slot"] for link in self.links if link["origin_id"] == INPUTS})
        ids, first = [], None
        for target in targets:
            node, input_name = self._find(target)
            place = next(i for i, input_ in enumerate(node["inputs"]) if input_["name"] == input_name)
            found = node["inputs"][place]
            first = first or found
            ids.append(self._link(INPUTS, slot, node["id"], place, found["type"]))
        assert first is not None
        if "widget" in first:
            self.widgets.add(name)
        label = self._labels.get(name, first["localized_name"])
        return {**self._slot("input", name, first["type"], ids), "label": label}

    def output(self, name: str, source: str) -> dict[str, Any]:
        """One more output of the subgraph, from one of its nodes."""
        node, output_name = self._find(source)
        place = next(i for i, output in enumerate(node["outputs"]) if output["name"] == output_name)
        slot = len([link for link in self.links if link["target_id"] == OUTPUTS])
        type_ = node["outputs"][place]["type"]
        return self._slot("output", name, type_, [self._link(node["id"], place, OUTPUTS, slot, type_)])

    def _slot(self, kind: str, name: str, type_: str, links: list[int]) -> dict[str, Any]:
        return {"id": _uuid(f"{self._id} {kind} {name}"), "name": name, "type": type_, "linkIds": links}


def _instance(definition: Mapping[str, Any], widgets: set[str], pictures: int) -> dict[str, Any]:
    """The one node of the graph, which stands for the subgraph; its widgets hold what those inside do."""
    inputs = [
        {
            **{key: input_[key] for key in ("name", "label", "type")},
            **({"widget": {"name": input_["name"]}} if input_["name"] in widgets else {}),
            "link": None,
        }
        for input_ in definition["inputs"]
    ]
    return {
        "id": 1,
        "type": definition["id"],
        "pos": [0, 0],
        "size": [400, 440],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": inputs,
        "outputs": [{"name": out["name"], "type": out["type"], "links": []} for out in definition["outputs"]],
        "properties": {
            "previewExposures": [{"name": PICTURES, "sourceNodeId": str(pictures), "sourcePreviewName": PICTURES}]
        },
        "widgets_values": [],
        "title": definition["name"],
    }


def _place(id_: int, nodes: list[dict[str, Any]], slots: int) -> dict[str, Any]:
    """Where the subgraph's inputs (left of all nodes) or outputs (right of them) end."""
    left = min(node["pos"][0] for node in nodes) - 240
    right = max(node["pos"][0] + node["size"][0] for node in nodes) + 120
    return {"id": id_, "bounding": [round(left if id_ == INPUTS else right), 0, 120, TITLE + SLOT * slots]}


def _uuid(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"dgpo blueprint {name}"))


def text_of(name: str) -> str:
    """What the file of a blueprint holds."""
    return json.dumps(made(name), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    SUBGRAPHS.mkdir(exist_ok=True)
    for name in BLUEPRINTS:
        (SUBGRAPHS / f"{name}.json").write_text(text_of(name), "utf-8")
        print(f"subgraphs/{name}.json")


if __name__ == "__main__":
    main()
