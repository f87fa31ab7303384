"""The training settings in a workflow of the ComfyUI nodes, in API or in UI format, as settings of the engine.

The same seeds give the same adapter as in ComfyUI. What only a person or another node can do there (rank, score, rate)
cannot run headless and is refused; so is what a file that is shared may not decide (see `trust`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgpo_core.comfy.forms import (
    EDITS,
    EDITS_HELD_OUT,
    FORMS,
    HELD_OUT,
    LORA_TRAINER,
    MODEL_FOLDERS,
    MODELS_OWN,
    NO_LORA,
    SHIPPED,
    TEXT,
    TRAINING_LOOP,
    WATCHING,
    WILDCARDS,
    Form,
    Link,
    Widget,
    as_setting,
    chosen_preset,
    shipped_model,
)
from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import parse_json, read_json, shown
from dgpo_core.rewards import WEIGHTS_FILE, chosen_file
from dgpo_core.rewards.trust import check_shared
from dgpo_core.settings import shipped
from dgpo_core.settings.config import AUTO, EMBEDDED, Config, RewardTerm
from dgpo_core.settings.values import read_rewards, to_plain

CONTROLLED = ("iteration",)  # widgets behind which the front end stores one more value, "increment" or the like


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

    def find(self, *forms: Form) -> Node:
        """The first node of the first form that is there."""
        for form in forms:
            for node in self.nodes.values():
                if node.kind == form.id:
                    return node
        raise UserError(f"The workflow {self.path} has no node that trains (Training Loop or DGPO LoRA Trainer).")

    def has(self, form: Form) -> bool:
        """Whether there is such a node."""
        return any(node.kind == form.id for node in self.nodes.values())

    def behind(self, node: Node, name: str) -> Node:
        """The node that is linked to an input. Raises UserError if it is none that can stand there."""
        link, slot = node.inputs.get(name), FORMS[node.kind].inputs[name]
        if not isinstance(slot, Link):
            raise ValueError(f"{name} of {node.kind} is no input to connect")
        source, other = slot.source, self.nodes.get(str(link[0])) if link is not None and is_link(link) else None
        if other is None:
            raise UserError(f"In the workflow {self.path}, nothing is connected to {name!r} of {node.kind}.")
        if other.kind != source:
            raise UserError(
                f"The workflow {self.path} has {shown(other.kind, 60)} at {name!r} of {node.kind}, which only runs in"
                f" ComfyUI: connect {source} to run it headless."
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

    def settings(self, node: Node, *names: str) -> dict[str, Any]:
        """What the widgets of these names (all where none is named) set, such as {"lora.rank": 8}."""
        widgets = FORMS[node.kind].inputs
        found = {}
        for name in names or widgets:
            widget = widgets[name]
            if not isinstance(widget, Widget) or not widget.setting:
                continue
            if name in node.inputs or widget.needed:
                found[widget.setting] = _listed(self.value(node, name), widget.setting)
            elif widget.default is not None:
                found[widget.setting] = widget.default
        return found


def is_link(value: Any) -> bool:
    """Whether an input holds no value but a link, [id, output]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)


def _short(value: Any) -> str:
    return shown(repr(value), 60)


def _listed(value: Any, setting: str) -> Any:
    """Lists are texts with commas in a widget."""
    group, _, name = setting.rpartition(".")
    default = getattr(getattr(Config(), group) if group else Config(), name)
    value = as_setting(value, default)
    if not isinstance(default, tuple) or not isinstance(value, str):
        return value
    return [item.strip() for item in value.split(",") if item.strip()]


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"lora": {"rank": 8}} for {"lora.rank": 8}."""
    found: dict[str, Any] = {}
    for setting, value in settings.items():
        group, _, name = setting.rpartition(".")
        (found.setdefault(group, {}) if group else found)[name] = value
    return found


def training_of(flow: Workflow) -> dict[str, Any]:
    """The settings of its Training Loop or LoRA Trainer, for `from_dict`. Raises UserError, naming the file."""
    trainer = flow.find(TRAINING_LOOP, LORA_TRAINER)
    looped = trainer.kind == TRAINING_LOOP.id
    scorer = trainer if looped else flow.behind(trainer, "scored")
    drawer = trainer if looped else flow.behind(scorer, "groups")
    policy = flow.behind(drawer, "policy")
    sampler = flow.behind(drawer, "sampler" if looped else "settings")
    settings = {
        **_training(flow, flow.behind(trainer, "settings")),
        **policy_of(flow, policy),
        **flow.settings(sampler),
        "rollout.scheduler": _scheduler(flow, sampler),
        **{f"evaluation.{name}": flow.value(sampler, name) for name in ("steps", "cfg")},
        "evaluation.batch": as_setting(flow.value(sampler, "batch"), AUTO),
        **data_of(flow, flow.behind(drawer, "prompts")),
        "reward": rewards_of(flow, scorer),
        **flow.settings(trainer, "weights"),
    }
    if looped:
        settings |= flow.settings(trainer, "iterations") | _watched(flow, trainer)
    return nested(settings)


def _watched(flow: Workflow, loop: Node) -> dict[str, Any]:
    """What a Training Loop measures on the way; nothing without held-out prompts."""
    if not is_link(loop.inputs.get("held_out")):
        return {}
    watch = rewards_of(flow, loop, "watch") if is_link(loop.inputs.get("watch")) else []
    return {
        **flow.settings(loop, *WATCHING),
        "watch": [{**term, "weight": 1.0} for term in watch],
        **_held_out(flow, flow.behind(loop, "held_out"), flow.behind(loop, "prompts")),
    }


def _training(flow: Workflow, node: Node) -> dict[str, Any]:
    """As the node Training Settings has it: a chosen preset goes before the widgets."""
    chosen = chosen_preset(flow.text(node, "preset"))
    if chosen is None:
        return flow.settings(node)
    training, combine = chosen
    return {"training": to_plain(training), "combine": combine or flow.value(node, "combine")}


def _scheduler(flow: Workflow, sampler: Node) -> Any:
    choice = flow.value(sampler, "scheduler") if "scheduler" in sampler.inputs else MODELS_OWN
    return "" if choice == MODELS_OWN else choice


# --- rewards ---------------------------------------------------------------------------------------------------------


def rewards_of(flow: Workflow, scorer: Node, name: str = "reward") -> list[dict[str, Any]]:
    """The chain of rewards, first one first."""
    terms = [_term(flow, node) for node in _chain(flow, scorer, name)][::-1]
    check_shared(terms, f"The workflow {flow.path}")
    return [{"name": t.name, "weight": t.weight, "options": t.options, "only_if": t.only_if} for t in terms]


def _chain(flow: Workflow, scorer: Node, name: str) -> Iterator[Node]:
    """The rewards behind an input, last one first."""
    node, passed = flow.behind(scorer, name), set()
    while True:
        if id(node) in passed:
            raise UserError(f"In the workflow {flow.path}, the rewards are connected in a circle: cut it.")
        passed.add(id(node))
        yield node
        if not is_link(node.inputs.get("reward")):
            return
        node = flow.behind(node, "reward")


def _term(flow: Workflow, node: Node) -> RewardTerm:
    where = f"In the workflow {flow.path}, the options of a reward"
    optional = ("options", "only_if", WEIGHTS_FILE)
    given = {name: flow.text(node, name) if node.inputs.get(name) else "" for name in optional}
    options = parse_json(given["options"], where) if given["options"].strip() else {}
    name = flow.text(node, "name")
    if isinstance(options, dict):
        options |= chosen_file(name, given[WEIGHTS_FILE])
    term = {"name": name, "weight": flow.value(node, "weight"), "options": options}
    (found,) = read_rewards([{**term, "only_if": given["only_if"]}], f"The workflow {flow.path}")
    return found


# --- files -----------------------------------------------------------------------------------------------------------


def data_of(flow: Workflow, prompts: Node) -> dict[str, Any]:
    _refuse_images(flow, prompts)
    source = flow.text(prompts, "source")
    settings = flow.settings(prompts)
    if settings.get("data.wildcards"):
        settings["data.wildcard_folder"] = f"input/{WILDCARDS}"
    if source == TEXT:
        return {**settings, "data.text": flow.text(prompts, "text"), "data.held_out": ""}
    if source == EMBEDDED:
        return settings
    if source == EDITS:
        return {**settings, "data.prompts": shipped.EDITS, "data.held_out": shipped.EDITS}
    return {**settings, "data.prompts": _prompt_file(flow, source), "data.held_out": ""}


def _refuse_images(flow: Workflow, prompts: Node) -> None:
    """Raises UserError for pictures to edit that come from nodes."""
    if prompts.inputs.get("images") is not None:
        raise UserError(
            f"In the workflow {flow.path}, the 'images' of {prompts.kind} come from another node, which only runs in"
            ' ComfyUI: name the pictures as "image" in a .jsonl file of prompts to run it headless.'
        )


def _held_out(flow: Workflow, prompts: Node, training: Node) -> dict[str, Any]:
    _refuse_images(flow, prompts)
    ours, theirs = (flow.settings(node, "wildcards", "wildcard_seed") for node in (prompts, training))
    if ours != theirs:
        raise UserError(
            f"In the workflow {flow.path}, the two {prompts.kind} have different wildcards, which only runs in ComfyUI:"
            " give both the same number and seed to run it headless."
        )
    source = flow.text(prompts, "source")
    if source == TEXT:
        return {"data.held_out_text": flow.text(prompts, "text"), "data.held_out": ""}
    words = {HELD_OUT: EMBEDDED, EDITS_HELD_OUT: shipped.EDITS}
    return {"data.held_out": words[source] if source in words else _prompt_file(flow, source)}


def _prompt_file(flow: Workflow, source: str) -> str:
    """A file of ComfyUI's input folder, or one that ships. What a link in the folder leads out to is outside of it."""
    if source in SHIPPED:
        return str(SHIPPED[source])
    path = _inside(flow, "input", source)
    folder = Path("input").resolve()
    if folder not in Path(path).resolve().parents:
        raise UserError(_outside(flow, "input", source))
    return path


def policy_of(flow: Workflow, policy: Node) -> dict[str, Any]:
    """What Load Policy sets."""
    return {
        **flow.settings(policy),
        "model.path": model_of(flow, flow.text(policy, "model")),
        "lora.init": _lora(flow, flow.text(policy, "start_from")),
    }


def model_of(flow: Workflow, choice: str) -> str:
    """The path of one of Load Policy's models. Folders of models are often links to another disk; they are followed."""
    if word := shipped_model(choice):
        return word
    path = _inside(flow, "models", choice)
    if path.split("/")[1] not in MODEL_FOLDERS:
        where = " or ".join(f"models/{folder}" for folder in MODEL_FOLDERS)
        raise UserError(f"The workflow {flow.path} names the model {_short(choice)}, which is not in {where}.")
    return path


def _lora(flow: Workflow, choice: str) -> str:
    return "" if choice == NO_LORA else _inside(flow, "models/loras", choice)


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
        inputs: dict[str, Any] = {}
        written = node.get("widgets_values") or []
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
