"""The node of the native policy, and the steps that other nodes take with its policy; `comfy_native.py` runs it."""

from __future__ import annotations

import gc
import importlib
import types
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_native_case import Case  # first: it finds ComfyUI
from comfy_native_models import SIDE

# isort: split
import comfy.sd
import comfy_lora
import torch

from dgpo_core.common.prompts import Prompt
from dgpo_core.settings.config import Config, RewardTerm, RolloutConfig, TrainingConfig

native_models = importlib.import_module("pack.on_model.models")
native_texts = importlib.import_module("pack.on_model.texts")
native_node = importlib.import_module("pack.native")
held = importlib.import_module("pack.runs.held")
sessions = importlib.import_module("pack.runs.sessions")
values = importlib.import_module("pack.common.values")
WIDGETS = {
    "run": "a_run", "run_seed": 0, "rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "", "start_from": "none",
    "gradient_checkpointing": True,
}  # fmt: skip


def execute(case: Case, model: Any = None, **inputs: Any) -> Any:
    """What the node gives out, run as ComfyUI runs it."""
    with torch.inference_mode():
        node = native_node.NativePolicyNode
        node.hidden = types.SimpleNamespace(unique_id="1")
        return node.execute(model or case.model, case.clip, case.vae, **{**WIDGETS, **inputs}).result[0]


def step(handle: Any, iteration: int) -> tuple[Any, Any]:
    """One iteration by the steps that the nodes take."""
    sampler = values.Sampler(RolloutConfig(group_size=4, steps=4, solver="euler"), 8 * SIDE, 8 * SIDE)
    training = values.Training(TrainingConfig(timesteps=2, t_min=0.0, lr=1e-2, micro_batch=8))
    with torch.inference_mode():
        groups = sessions.draw(handle, [(0, Prompt("red"))], sampler, iteration, lambda: None)
        scored = sessions.score(groups, (RewardTerm("bright"),))
        after, state = sessions.learn(handle, scored, training, lambda: None)
        sessions.keep(after, state)
    return after, state


def same(a: Any, b: Any) -> bool:
    """Whether two states hold the same tensors, bit for bit."""
    return set(a.tensors) == set(b.tensors) and all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)


def look(case: Case, root: Path) -> dict[str, Any]:
    """The node, and the steps that other nodes take with its policy."""
    before = case.drawn()
    handle = execute(case)
    first, first_state = step(handle, 0)
    second, second_state = step(first, 1)
    with torch.inference_mode():
        lora = sessions.lora(second, second_state, (), Config(model=second.spec.model), "current")
        patched = comfy.sd.load_lora_for_models(case.model, None, dict(lora), 1.0, 0)[0]
    restored = bool(torch.equal(case.drawn(), before))
    again = Case(case.family)  # the same files, loaded again by another ComfyUI
    sessions.HELD = held.Held()
    handle_again = execute(again)
    resumed = step(sessions.resolve(handle_again, 1), 1)
    sessions.store(second.spec).folder.rename(root / "elsewhere")
    anew = step(handle_again, 0)
    spec = replace(handle_again.spec, model=replace(handle_again.spec.model, path="SD15-gone"))
    return {
        "steps": [first.step, second.step, second_state.step],
        "moved": not same(first_state, second_state),
        "patched": len(patched.patches),
        "differs": not torch.equal(case.drawn(patched), before),
        "metadata": {key: lora.metadata[key] for key in ("dgpo.base", "dgpo.step", "ss_base_model_version")},
        "restored": restored and bool(torch.equal(case.drawn(), before)),
        "named_alike": handle_again.spec == handle.spec,
        "resumed": resumed[0] == second,
        "anew": same(anew[1], first_state),
        "other_patches": execute(case, patched).spec.model.path != handle.spec.model.path,
        "network": sessions._load(handle_again.spec).policy.patcher.model is again.native.model,
        "lost": lost(again, patched),
        "freed": freed(case.family),
        "gone": comfy_lora.error(lambda: sessions._load(spec)),
        "bad_run": native_node.NativePolicyNode.validate_inputs(run="a/b", start_from=None),
    }


def freed(family: str) -> list[bool]:
    """Whether the weights are gone: while the outputs of an iteration are kept, and without them."""
    case = Case(family)
    sessions.HELD = held.Held()  # it would take a network that it knows for this one, of the same files
    policy = execute(case)
    outputs = [policy, *step(policy, 0)]
    weights = weakref.ref(case.model.model.diffusion_model)
    del case, policy
    gc.collect()
    gone = [weights() is None]
    outputs.clear()
    gc.collect()
    return [*gone, weights() is None]


def lost(case: Case, other: Any) -> list[int]:
    """How often a run has lost a MODEL: dropped, dropped while one alike is there, and after another was named."""

    def alike(number: int) -> Any:
        model = case.model.clone()
        model.model_options["number"] = number  # of no meaning to ComfyUI
        return model

    counts, kept = [], alike(1)
    for number, newer in enumerate((None, kept, other)):
        dropped = alike(number)
        for model in (dropped, newer):
            if model is not None:
                native_models.MODELS.remember(model, native_texts.by_clip(case.clip), case.vae, "b_run", "7")
        del dropped, model
        gc.collect()
        counts.append(native_models.MODELS.lost("b_run"))
    return [*counts, native_models.MODELS.lost("c_run"), native_models.MODELS.lost(None)]
