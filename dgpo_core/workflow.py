"""The training settings in a workflow of the ComfyUI nodes, in API or in UI format, as settings of the engine.

The same seeds give the same adapter as in ComfyUI. What only a person or another node can do there (rank, score, rate)
cannot run headless and is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dgpo_core.config import EMBEDDED, Config, LoraConfig, MemoryConfig, RolloutConfig, TrainingConfig
from dgpo_core.config_io import apply_mode, load_preset, preset_names, to_plain
from dgpo_core.errors import UserError
from dgpo_core.rewards import refuse_files

MODELS_OWN = "model's own"
"""The choice of Sampler Settings that is no scheduler."""
HELD_OUT = "embedded, held out"  # the embedded model's prompts that it does not train on, in the node Prompts
CONTROLLED = ("iteration",)  # widgets behind which the front end stores one more value, "increment" or the like


@dataclass(frozen=True)
class Node:
    """One node of a workflow: widget values, and links as [id of the other node, output]."""

    kind: str
    inputs: Mapping[str, Any]


class Workflow:
    """The nodes of a workflow file, and the ways along its links."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"There is no workflow file {path}.") from None
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise UserError(f"The workflow file {path} cannot be read: {error}.") from None
        try:
            self.nodes = read_nodes(data)
        except ValueError:
            raise UserError(f"{path} is not a workflow of ComfyUI: save it with Save or Export (API).") from None

    def find(self, *kinds: str) -> Node:
        """The first node of the first kind that is there."""
        for kind in kinds:
            for node in self.nodes.values():
                if node.kind == kind:
                    return node
        raise UserError(f"The workflow {self.path} has no node that trains (Training Loop or DGPO LoRA Trainer).")

    def behind(self, node: Node, name: str, *kinds: str) -> Node:
        """The node that is linked to an input. Raises UserError if it is none of `kinds`."""
        link = node.inputs.get(name)
        other = self.nodes.get(str(link[0])) if isinstance(link, list) else None
        if other is None:
            raise UserError(f"In the workflow {self.path}, nothing is connected to {name!r} of {node.kind}.")
        if other.kind not in kinds:
            raise UserError(
                f"The workflow {self.path} has {other.kind} at {name!r} of {node.kind}, which only runs in ComfyUI:"
                f" connect {' or '.join(kinds)} to run it headless."
            )
        return other


def load_workflow(path: str | Path) -> dict[str, Any]:
    """The settings of the training in a workflow, for `config_io.from_dict`. Raises UserError, naming the file."""
    flow = Workflow(path)
    trainer = flow.find("DGPO_TrainingLoop", "DGPO_LoRATrainer")
    looped = trainer.kind == "DGPO_TrainingLoop"
    scorer = trainer if looped else flow.behind(trainer, "scored", "DGPO_RewardScorer")
    drawer = trainer if looped else flow.behind(scorer, "groups", "DGPO_GroupSampler")
    policy = flow.behind(drawer, "policy", "DGPO_LoadPolicy").inputs
    sampler = flow.behind(drawer, "sampler" if looped else "settings", "DGPO_SamplerSettings").inputs
    prompts = flow.behind(drawer, "prompts", "DGPO_Prompts").inputs
    training, combine = _training(flow.behind(trainer, "settings", "DGPO_TrainingSettings").inputs)
    settings = {
        "name": policy["run"],
        "seed": policy["run_seed"],
        "combine": combine,
        "reward": _rewards(flow, scorer),
        "model": {
            "path": _file(policy["model"], "models"),
            "dtype": policy["dtype"],
            "prediction": policy.get("prediction", "auto"),  # older workflows have none
            "height": sampler["height"],
            "width": sampler["width"],
        },
        "lora": {**_of(LoraConfig, policy), "init": _file(policy["start_from"], "models/loras")},
        "memory": _of(MemoryConfig, policy),
        "data": _data(prompts),
        "rollout": {**_of(RolloutConfig, sampler), "scheduler": _scheduler(sampler.get("scheduler", MODELS_OWN))},
        "training": training,
        "evaluation": {
            "steps": sampler["steps"],
            "cfg": sampler["cfg"],
            "batch": sampler["batch"],
            "weights": trainer.inputs["weights"],
        },
    }
    if not looped:
        return settings
    settings["iterations"] = trainer.inputs["iterations"]
    return _watched(flow, trainer, settings)


def _watched(flow: Workflow, loop: Node, settings: dict[str, Any]) -> dict[str, Any]:
    """With what a Training Loop measures on the way; without held-out prompts, as they are."""
    if not isinstance(loop.inputs.get("held_out"), list):
        return settings
    evaluation = {
        "every": loop.inputs.get("evaluate_every", 10),
        "images": loop.inputs.get("evaluation_images", 64),
        "on_alarm": loop.inputs.get("on_alarm", "warn"),
    }
    watch = _rewards(flow, loop, "watch") if isinstance(loop.inputs.get("watch"), list) else []
    return {
        **settings,
        "watch": [{**term, "weight": 1.0} for term in watch],
        "data": settings["data"] | _held_out(flow.behind(loop, "held_out", "DGPO_Prompts").inputs),
        "evaluation": settings["evaluation"] | evaluation,
    }


def _held_out(prompts: Mapping[str, Any]) -> dict[str, Any]:
    source = prompts["source"]
    if source == "the text below":
        return {"held_out_text": prompts["text"], "held_out": ""}
    return {"held_out": EMBEDDED if source == HELD_OUT else _prompt_file(source)}


def _training(widgets: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """As the node Training Settings has it: a chosen preset goes before the widgets."""
    preset = widgets["preset"]
    if preset in preset_names():
        chosen = load_preset(preset)
        return to_plain(chosen.training), chosen.combine
    if preset.startswith("mode "):
        return to_plain(apply_mode(Config(), preset.removeprefix("mode ")).training), widgets["combine"]
    return _of(TrainingConfig, widgets), widgets["combine"]


def _rewards(flow: Workflow, scorer: Node, name: str = "reward") -> list[dict[str, Any]]:
    """The chain of rewards, first one first."""
    terms, node = [], flow.behind(scorer, name, "DGPO_Reward")
    while True:
        options = node.inputs.get("options") or ""
        try:
            read = json.loads(options) if options.strip() else {}
        except ValueError as error:
            raise UserError(f"In the workflow {flow.path}, the options of a reward are no JSON ({error}).") from None
        refuse_files([node.inputs["name"]], f"The workflow {flow.path}", "give it with --reward")
        term = {"name": node.inputs["name"], "weight": node.inputs["weight"], "options": read}
        terms.insert(0, {**term, "only_if": node.inputs.get("only_if") or ""})
        if not isinstance(node.inputs.get("reward"), list):
            return terms
        node = flow.behind(node, "reward", "DGPO_Reward")


def _data(prompts: Mapping[str, Any]) -> dict[str, Any]:
    source = prompts["source"]
    found = {"groups_per_iteration": prompts["per_iteration"], "order_seed": prompts["order_seed"]}
    if source == "the text below":
        return {**found, "text": prompts["text"], "held_out": ""}
    if source == EMBEDDED:
        return found
    return {**found, "prompts": _prompt_file(source), "held_out": ""}


def _prompt_file(source: str) -> str:
    shipped = {EMBEDDED: "train.jsonl", HELD_OUT: "held_out.jsonl"}
    return str(Path(__file__).parent / "demo" / shipped[source]) if source in shipped else f"input/{source}"


def _file(choice: str, folder: str) -> str:
    """What a combo of files names, relative to ComfyUI's folder."""
    if choice == "none":
        return ""
    return "embedded" if choice.startswith("embedded") else f"{folder}/{choice}"


def _scheduler(choice: str) -> str:
    return "" if choice == MODELS_OWN else choice


def _of(group: type, widgets: Mapping[str, Any]) -> dict[str, Any]:
    """The widgets that are fields of a group of settings; lists are texts with commas."""
    found = {}
    for field in fields(group):
        if field.name in widgets:
            value = widgets[field.name]
            is_list = isinstance(field.default, tuple) and isinstance(value, str)
            found[field.name] = [item.strip() for item in value.split(",") if item.strip()] if is_list else value
    return found


def read_nodes(data: Any) -> dict[str, Node]:
    """The nodes of a workflow in API or in UI format, by id. Raises ValueError where it is neither."""
    try:
        return _from_ui(data) if "nodes" in data else _from_api(data)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, StopIteration):
        raise ValueError("not a workflow") from None


def _from_api(data: Mapping[str, Any]) -> dict[str, Node]:
    return {key: Node(node["class_type"], node["inputs"]) for key, node in data.items()}


def _from_ui(data: Mapping[str, Any]) -> dict[str, Node]:
    """The front end lists links apart, and a node's widget values in the order of its widgets."""
    sources = {link[0]: [str(link[1]), link[2]] for link in data["links"]}
    nodes = {}
    for node in data["nodes"]:
        if node.get("mode", 0) in (2, 4):  # muted or bypassed
            continue
        inputs, values = {}, iter(node.get("widgets_values") or [])
        for slot in node.get("inputs", []):
            name = slot["name"]
            if "widget" in slot:
                inputs[name] = next(values)
                if name in CONTROLLED:
                    next(values)
            if slot.get("link") is not None:
                inputs[name] = sources[slot["link"]]
        nodes[str(node["id"])] = Node(node["type"], inputs)
    return nodes
