"""The training settings in a workflow of the ComfyUI nodes, in API or in UI format, as settings of the engine.

The same seeds give the same adapter as in ComfyUI. What only a person or another node can do there (rank, score, rate)
cannot run headless and is refused; so is what a file that is shared may not decide (see `trust`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import parse_json, read_json, shown
from dgpo_core.rewards.trust import check_shared
from dgpo_core.settings.config import (
    EMBEDDED,
    Config,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    RewardTerm,
    RolloutConfig,
    TrainingConfig,
)
from dgpo_core.settings.presets import apply_mode, load_preset, preset_names
from dgpo_core.settings.values import read_rewards, to_plain

MODELS_OWN = "model's own"
"""The choice of Sampler Settings that is no scheduler."""
HELD_OUT = "embedded, held out"  # the embedded model's prompts that it does not train on, in the node Prompts
CONTROLLED = ("iteration",)  # widgets behind which the front end stores one more value, "increment" or the like
TEXT = "the text below"  # the choice of the node Prompts that is no file
SHIPPED = {EMBEDDED: "train.jsonl", HELD_OUT: "held_out.jsonl"}
MODELS = ("checkpoints", "diffusers")
"""The folders of models/ that the node Load Policy lists."""


_NOTHING = object()


@dataclass(frozen=True)
class Node:
    """One node of a workflow: widget values, and links as [id of the other node, output]."""

    kind: str
    inputs: Mapping[str, Any]


class Workflow:
    """The nodes of a workflow file, and the ways along its links."""

    def __init__(self, path: str | Path) -> None:
        self.path = shown(path)
        data = read_json(path, "The workflow file")
        try:
            self.nodes = read_nodes(data)
        except ValueError:
            raise UserError(f"{self.path} is not a workflow of ComfyUI: save it with Save or Export (API).") from None

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
        other = self.nodes.get(str(link[0])) if is_link(link) else None
        if other is None:
            raise UserError(f"In the workflow {self.path}, nothing is connected to {name!r} of {node.kind}.")
        if other.kind not in kinds:
            raise UserError(
                f"The workflow {self.path} has {shown(other.kind, 60)} at {name!r} of {node.kind}, which only runs in"
                f" ComfyUI: connect {' or '.join(kinds)} to run it headless."
            )
        return other

    def value(self, node: Node, name: str) -> Any:
        """What stands in a widget. Raises UserError where it is missing, or comes from another node."""
        if name not in node.inputs:
            raise UserError(f"In the workflow {self.path}, {node.kind} has no {name!r}: save it again in ComfyUI.")
        found = node.inputs[name]
        if is_link(found):
            raise UserError(
                f"In the workflow {self.path}, {name!r} of {node.kind} comes from another node, which only runs in"
                " ComfyUI: write it into the widget to run it headless."
            )
        return found

    def text(self, node: Node, name: str) -> str:
        """`value`, a text."""
        found = self.value(node, name)
        if not isinstance(found, str):
            where = f"In the workflow {self.path}, {name!r} of {node.kind}"
            raise UserError(f"{where} must be a text, not {_short(found)}.")
        return found

    def values(self, node: Node, group: type, *, but: tuple[str, ...] = ()) -> dict[str, Any]:
        """The widgets that are fields of a group of settings; lists are texts with commas."""
        names = [field for field in fields(group) if field.name in node.inputs and field.name not in but]
        return {field.name: _listed(self.value(node, field.name), field.default) for field in names}


def is_link(value: Any) -> bool:
    """Whether an input holds no value but a link, [id, output]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)


def _short(value: Any) -> str:
    return shown(repr(value), 60)


def _listed(value: Any, default: Any) -> Any:
    if not isinstance(default, tuple) or not isinstance(value, str):
        return value
    return [item.strip() for item in value.split(",") if item.strip()]


def load_workflow(path: str | Path) -> dict[str, Any]:
    """The settings of the training in a workflow, for `from_dict`. Raises UserError, naming the file."""
    flow = Workflow(path)
    trainer = flow.find("DGPO_TrainingLoop", "DGPO_LoRATrainer")
    looped = trainer.kind == "DGPO_TrainingLoop"
    scorer = trainer if looped else flow.behind(trainer, "scored", "DGPO_RewardScorer")
    drawer = trainer if looped else flow.behind(scorer, "groups", "DGPO_GroupSampler")
    policy = flow.behind(drawer, "policy", "DGPO_LoadPolicy")
    sampler = flow.behind(drawer, "sampler" if looped else "settings", "DGPO_SamplerSettings")
    training, combine = _training(flow, flow.behind(trainer, "settings", "DGPO_TrainingSettings"))
    settings = {
        "name": flow.value(policy, "run"),
        "seed": flow.value(policy, "run_seed"),
        "combine": combine,
        "reward": _rewards(flow, scorer),
        "model": {
            **flow.values(policy, ModelConfig),  # `prediction`, which older workflows do not have
            "path": _model(flow, flow.text(policy, "model")),
            "dtype": flow.value(policy, "dtype"),
            "height": flow.value(sampler, "height"),
            "width": flow.value(sampler, "width"),
        },
        "lora": {**flow.values(policy, LoraConfig), "init": _lora(flow, flow.text(policy, "start_from"))},
        "memory": flow.values(policy, MemoryConfig),
        "data": _data(flow, flow.behind(drawer, "prompts", "DGPO_Prompts")),
        "rollout": {**flow.values(sampler, RolloutConfig, but=("scheduler",)), "scheduler": _scheduler(flow, sampler)},
        "training": training,
        "evaluation": {
            "steps": flow.value(sampler, "steps"),
            "cfg": flow.value(sampler, "cfg"),
            "batch": flow.value(sampler, "batch"),
            "weights": flow.value(trainer, "weights"),
        },
    }
    if not looped:
        return settings
    settings["iterations"] = flow.value(trainer, "iterations")
    return _watched(flow, trainer, settings)


def _watched(flow: Workflow, loop: Node, settings: dict[str, Any]) -> dict[str, Any]:
    """With what a Training Loop measures on the way; without held-out prompts, as they are."""
    if not is_link(loop.inputs.get("held_out")):
        return settings
    names = {"evaluate_every": ("every", 10), "evaluation_images": ("images", 64), "on_alarm": ("on_alarm", "warn")}
    evaluation = {
        name: flow.value(loop, widget) if widget in loop.inputs else default
        for widget, (name, default) in names.items()
    }
    watch = _rewards(flow, loop, "watch") if is_link(loop.inputs.get("watch")) else []
    return {
        **settings,
        "watch": [{**term, "weight": 1.0} for term in watch],
        "data": settings["data"] | _held_out(flow, flow.behind(loop, "held_out", "DGPO_Prompts")),
        "evaluation": settings["evaluation"] | evaluation,
    }


def _training(flow: Workflow, node: Node) -> tuple[dict[str, Any], Any]:
    """As the node Training Settings has it: a chosen preset goes before the widgets."""
    preset = flow.text(node, "preset")
    if preset in preset_names():
        chosen = load_preset(preset)
        return to_plain(chosen.training), chosen.combine
    if preset.startswith("mode "):
        return to_plain(apply_mode(Config(), preset.removeprefix("mode ")).training), flow.value(node, "combine")
    return flow.values(node, TrainingConfig), flow.value(node, "combine")


def _scheduler(flow: Workflow, sampler: Node) -> Any:
    choice = flow.value(sampler, "scheduler") if "scheduler" in sampler.inputs else MODELS_OWN
    return "" if choice == MODELS_OWN else choice


# --- rewards ---------------------------------------------------------------------------------------------------------


def _rewards(flow: Workflow, scorer: Node, name: str = "reward") -> list[dict[str, Any]]:
    """The chain of rewards, first one first."""
    terms = [_term(flow, node) for node in _chain(flow, scorer, name)][::-1]
    check_shared(terms, f"The workflow {flow.path}")
    return [{"name": t.name, "weight": t.weight, "options": t.options, "only_if": t.only_if} for t in terms]


def _chain(flow: Workflow, scorer: Node, name: str) -> Iterator[Node]:
    """The rewards behind an input, last one first."""
    node, passed = flow.behind(scorer, name, "DGPO_Reward"), set()
    while True:
        if id(node) in passed:
            raise UserError(f"In the workflow {flow.path}, the rewards are connected in a circle: cut it.")
        passed.add(id(node))
        yield node
        if not is_link(node.inputs.get("reward")):
            return
        node = flow.behind(node, "reward", "DGPO_Reward")


def _term(flow: Workflow, node: Node) -> RewardTerm:
    where = f"In the workflow {flow.path}, the options of a reward"
    given = {name: flow.text(node, name) if node.inputs.get(name) else "" for name in ("options", "only_if")}
    options = parse_json(given["options"], where) if given["options"].strip() else {}
    term = {"name": flow.text(node, "name"), "weight": flow.value(node, "weight"), "options": options}
    (found,) = read_rewards([{**term, "only_if": given["only_if"]}], f"The workflow {flow.path}")
    return found


# --- files -----------------------------------------------------------------------------------------------------------


def _data(flow: Workflow, prompts: Node) -> dict[str, Any]:
    source = flow.text(prompts, "source")
    found = {
        "groups_per_iteration": flow.value(prompts, "per_iteration"),
        "order_seed": flow.value(prompts, "order_seed"),
    }
    if source == TEXT:
        return {**found, "text": flow.text(prompts, "text"), "held_out": ""}
    if source == EMBEDDED:
        return found
    return {**found, "prompts": _prompt_file(flow, source), "held_out": ""}


def _held_out(flow: Workflow, prompts: Node) -> dict[str, Any]:
    source = flow.text(prompts, "source")
    if source == TEXT:
        return {"held_out_text": flow.text(prompts, "text"), "held_out": ""}
    return {"held_out": EMBEDDED if source == HELD_OUT else _prompt_file(flow, source)}


def _prompt_file(flow: Workflow, source: str) -> str:
    """A file of ComfyUI's input folder, or one that ships. What a link in the folder leads out to is outside of it."""
    if source in SHIPPED:
        return str(Path(__file__).parents[1] / "demo" / SHIPPED[source])
    path = _inside(flow, "input", source)
    folder = Path("input").resolve()
    if folder not in Path(path).resolve().parents:
        raise UserError(_outside(flow, "input", source))
    return path


def _model(flow: Workflow, choice: str) -> str:
    """The path of one of Load Policy's models. Folders of models are often links to another disk; they are followed."""
    if choice.startswith("embedded"):
        return EMBEDDED
    path = _inside(flow, "models", choice)
    if path.split("/")[1] not in MODELS:
        where = "models/checkpoints or models/diffusers"
        raise UserError(f"The workflow {flow.path} names the model {_short(choice)}, which is not in {where}.")
    return path


def _lora(flow: Workflow, choice: str) -> str:
    return "" if choice == "none" else _inside(flow, "models/loras", choice)


def _inside(flow: Workflow, folder: str, name: str) -> str:
    """A file below one of ComfyUI's folders, as folder/name. Raises UserError for a name that could lead elsewhere."""
    parts = name.replace("\\", "/").split("/")  # saved on Windows, a name in a subfolder has backslashes
    if not all(part.strip(" .") and not {":", "\0"} & set(part) for part in parts):
        raise UserError(_outside(flow, folder, name))
    return "/".join([folder, *parts])


def _outside(flow: Workflow, folder: str, name: str) -> str:
    return f"The workflow {flow.path} names the file {_short(name)} outside of ComfyUI's folder {folder}: put it there."


# --- formats ---------------------------------------------------------------------------------------------------------


def read_nodes(data: Any) -> dict[str, Node]:
    """The nodes of a workflow in API or in UI format, by id. Raises ValueError where it is neither."""
    try:
        nodes = _from_ui(data) if "nodes" in data else _from_api(data)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise ValueError("not a workflow") from None
    if not all(isinstance(node.kind, str) and isinstance(node.inputs, Mapping) for node in nodes.values()):
        raise ValueError("not a workflow")
    return nodes


def _from_api(data: Mapping[str, Any]) -> dict[str, Node]:
    return {key: Node(node["class_type"], node["inputs"]) for key, node in data.items()}


def _from_ui(data: Mapping[str, Any]) -> dict[str, Node]:
    """The front end lists links apart, and a node's widget values in the order of its widgets."""
    sources = {link[0]: [str(link[1]), link[2]] for link in data["links"]}
    nodes = {}
    for node in data["nodes"]:
        if node.get("mode", 0) in (2, 4):  # muted or bypassed
            continue
        inputs, written = {}, node.get("widgets_values") or []
        values = iter(written if isinstance(written, list) else [])
        for slot in node.get("inputs") or []:
            name = slot["name"]
            if "widget" in slot:
                found = written.get(name, _NOTHING) if isinstance(written, dict) else next(values, _NOTHING)
                inputs |= {} if found is _NOTHING else {name: found}
                if name in CONTROLLED:
                    next(values, None)
            if slot.get("link") in sources:
                inputs[name] = sources[slot["link"]]
        nodes[str(node["id"])] = Node(node["type"], inputs)
    return nodes
