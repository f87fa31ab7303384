"""The node Teach of a workflow as settings of the engine: a recipe for the model, and what the node says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgpo_core.comfy.forms import LORA_TRAINER, TEACH, TEACH_ME, TRAINING_LOOP
from dgpo_core.comfy.workflow import Node, Workflow, data_of, model_of, nested, policy_of, rewards_of, training_of
from dgpo_core.common.errors import UserError
from dgpo_core.settings import shipped
from dgpo_core.settings.config import MOST_ITERATIONS
from dgpo_core.settings.recipes import recipe
from dgpo_core.settings.values import from_dict, to_dict

KindOf = Callable[[str], str]
"""The family of a model, by its file or folder."""


def load_training(path: str | Path, kind_of: KindOf) -> dict[str, Any]:
    """The settings of the training in a workflow, by whichever node. Raises UserError, naming the file."""
    flow = Workflow(path)
    if flow.has(TEACH) and not (flow.has(TRAINING_LOOP) or flow.has(LORA_TRAINER)):
        return _taught(flow, flow.find(TEACH), kind_of)
    return training_of(flow)


def _taught(flow: Workflow, node: Node, kind_of: KindOf) -> dict[str, Any]:
    """Raises UserError where a person is to judge."""
    judges = _judges(flow, node)
    own = policy_of(flow, flow.behind(node, "policy")) if node.inputs.get("policy") is not None else {}
    path = own.get("model.path") or model_of(flow, flow.text(node, "model"))
    chosen = recipe(path if path in shipped.MODELS else kind_of(path), people=False)
    size = flow.value(node, "size") if node.inputs.get("size") else 0
    settings = {
        **data_of(flow, node),
        "data.order_seed": 0,
        "iterations": MOST_ITERATIONS,
        "model.path": path,
        **own,
        "model.height": size or chosen.model.height,
        "model.width": size or chosen.model.width,
        "reward": judges,
    }
    return to_dict(from_dict(nested(settings), chosen, flow.path))


def _judges(flow: Workflow, node: Node) -> list[dict[str, Any]]:
    if node.inputs.get("reward") is not None:
        return rewards_of(flow, node)
    judge = flow.text(node, "judge")
    if judge == TEACH_ME:
        raise UserError(
            f"In the workflow {flow.path}, {node.kind} asks a person, which only runs in ComfyUI: choose a reward as"
            " its judge to run it headless, or train with --reward human."
        )
    return [{"name": judge}]
