"""The native policies in whole graphs of a real ComfyUI: checkpoint, train, save, draw with the LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_checkpoint import checkpoint
from comfy_graphs import Graph
from comfy_native_graphs import DEFAULTS, LORA, graph, ksampler, node
from comfy_results import equal, lora, tensors
from comfy_server import ComfyServer, images
from torch import Tensor


def test_a_checkpoint_is_trained_in_place_and_stays_what_it_was(comfy: ComfyServer) -> None:
    checkpoint(comfy)
    alone = {name: node for name, node in graph(0).items() if name.startswith(("plain", "loader"))}
    before = comfy.view(next(images(comfy.run(alone)))).tobytes()
    for iteration in (0, 1):
        entry = comfy.run(graph(iteration))
        applied = entry["outputs"]["said"]["text"][0]
        count, _, total = applied.split(" modules")[0].partition(" of ")
        assert count == total, applied
        plain, trained = (comfy.view(entry["outputs"][name]["images"][0]).tobytes() for name in ("plain", "trained"))
        assert plain == before
        assert trained != before
    comfy.free()
    assert comfy.view(next(images(comfy.run(alone)))).tobytes() == before


# --- loops on a small SD1.5 ------------------------------------------------------------------------------------------

SMALL = "v1-5-pruned-emaonly-fp16.safetensors"
TEXTS = ("a red lamp", "a blue sofa")


def loop(run: str, model: list[Any], clip: list[Any], vae: list[Any]) -> Graph:
    """A run of one iteration, with its LoRA saved under its name."""
    training = {"timesteps": 1, "t_min": 0.0, "micro_batch": 4, "lr": 0.01}
    return {
        f"{run} policy": node("DGPO_NativePolicy", model=model, clip=clip, vae=vae, run=run, **LORA),
        f"{run} prompts": node(
            "DGPO_Prompts", source="the text below", text="\n".join(TEXTS), per_iteration=2, order_seed=0
        ),
        f"{run} sampler": node(
            "DGPO_SamplerSettings", solver="dpmpp_2m", steps=3, cfg=2.0, group_size=2, batch=2, negative_prompt="",
            on_policy_steps=100, height=64, width=64, scheduler="karras",
        ),
        f"{run} reward": node("DGPO_Reward", name="brightness", weight=1.0, options=""),
        f"{run} training": node("DGPO_TrainingSettings", preset="as set below", combine="sum", **DEFAULTS | training),
        f"{run} loop": node(
            "DGPO_TrainingLoop", policy=[f"{run} policy", 0], prompts=[f"{run} prompts", 0],
            sampler=[f"{run} sampler", 0], reward=[f"{run} reward", 0], settings=[f"{run} training", 0], iterations=1,
            save_every=1, weights="current",
        ),
        f"{run} save": node("DGPO_SaveLoRA", lora=[f"{run} loop", 1], name=run, metadata=""),
    }  # fmt: skip


def loader() -> Graph:
    return {"loader": node("CheckpointLoaderSimple", ckpt_name=SMALL)}


def plain(run: str) -> Graph:
    """The checkpoint, trained as it is."""
    return {**loader(), **loop(run, ["loader", 0], ["loader", 1], ["loader", 2])}


def rescaled(run: str, multiplier: float) -> Graph:
    """The checkpoint with a patch that changes its guidance."""
    found = {**loader(), "patch": node("RescaleCFG", model=["loader", 0], multiplier=multiplier)}
    return {**found, **loop(run, ["patch", 0], ["loader", 1], ["loader", 2])}


def conditioned(run: str) -> Graph:
    """As `plain`, with each prompt's conditioning made by a node of its own."""
    found = plain(run)
    texts = {**{str(i): text for i, text in enumerate(TEXTS)}, "negative": ""}
    found |= {f"{key} text": node("CLIPTextEncode", clip=["loader", 1], text=text) for key, text in texts.items()}
    found["0"] = node("DGPO_ConditionedPrompt", conditioning=["0 text", 0], text=TEXTS[0])
    found["1"] = node("DGPO_ConditionedPrompt", conditioning=["1 text", 0], text=TEXTS[1], previous=["0", 0])
    found[f"{run} policy"] = node(
        "DGPO_NativePolicyConditioning", model=["loader", 0], vae=["loader", 2], conditionings=["1", 0],
        negative=["negative text", 0], run=run, per_iteration=2, order_seed=0, **LORA,
    )  # fmt: skip
    del found[f"{run} prompts"]
    found[f"{run} loop"]["inputs"]["prompts"] = [f"{run} policy", 1]
    return found


def ran(entry: dict[str, Any], whole: Graph) -> set[str]:
    """The nodes that were not taken from ComfyUI's cache."""
    cached = next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
    return set(whole) - set(cached)


def lora_of(comfy: ComfyServer, entry: dict[str, Any], run: str) -> dict[str, Tensor]:
    return tensors(lora(comfy, entry, f"{run} save"))


def lines(comfy: ComfyServer, run: str) -> list[Path]:
    """The lines of states that a run has."""
    return sorted((comfy.base / "output" / "dgpo" / run).iterdir())


def test_the_model_with_the_lora_is_drawn_with_and_the_base_is_not_touched(small_comfy: ComfyServer) -> None:
    base = {**loader(), **ksampler("plain", ["loader", 0])}
    before = small_comfy.view(next(images(small_comfy.run(base)))).tobytes()
    out = {**plain("out"), "model": node("DGPO_PolicyModel", policy=["out loop", 0], weights="current")}
    whole = {**base, **out, **ksampler("trained", ["model", 0])}
    entry = small_comfy.run(whole)
    assert ran(small_comfy.run(whole), whole) == set()
    pictures = {key: small_comfy.view(entry["outputs"][key]["images"][0]).tobytes() for key in ("plain", "trained")}
    file = entry["outputs"]["out save"]["text"][0]
    by_comfyui = node("LoraLoaderModelOnly", model=["loader", 0], lora_name=file, strength_model=1.0)
    applied = small_comfy.run({**loader(), "applied": by_comfyui, **ksampler("trained", ["applied", 0])})
    assert pictures["plain"] == before != pictures["trained"]
    assert small_comfy.view(applied["outputs"]["trained"]["images"][0]).tobytes() == pictures["trained"]
    assert small_comfy.view(next(images(small_comfy.run(base)))).tobytes() == before


def test_nothing_runs_again_until_something_changes(small_comfy: ComfyServer) -> None:
    first, other = rescaled("patched", 0.5), rescaled("patched", 0.7)
    small_comfy.run(first)
    assert ran(small_comfy.run(first), first) == set()
    changed = small_comfy.run(other)
    assert "patched loop" in ran(changed, other)
    assert len(lines(small_comfy, "patched")) == 2
    assert ran(small_comfy.run(other), other) == set()  # the MODEL that is gone is missed by nobody
    small_comfy.run(first)
    assert len(lines(small_comfy, "patched")) == 2


def test_two_policies_on_one_checkpoint_train_as_each_does_alone(small_comfy: ComfyServer) -> None:
    both = {**plain("one"), **loop("two", ["loader", 0], ["loader", 1], ["loader", 2])}
    both["two policy"]["inputs"]["run_seed"] = 1
    together = small_comfy.run(both)
    assert ran(small_comfy.run(both), both) == set()
    alone = small_comfy.run(plain("alone"))
    assert equal(lora_of(small_comfy, together, "one"), lora_of(small_comfy, alone, "alone"))
    assert not equal(lora_of(small_comfy, together, "one"), lora_of(small_comfy, together, "two"))


def test_conditionings_train_what_the_texts_train_and_go_on_after_a_restart(small_comfy: ComfyServer) -> None:
    whole = conditioned("conditioned")
    entry = small_comfy.run(whole)
    texts = small_comfy.run(plain("texts"))
    assert equal(lora_of(small_comfy, entry, "conditioned"), lora_of(small_comfy, texts, "texts"))
    (line,) = lines(small_comfy, "conditioned")
    states = set(line.glob("state_*"))
    small_comfy.restart()
    whole["conditioned loop"]["inputs"]["iterations"] = 2
    small_comfy.run(whole)
    assert lines(small_comfy, "conditioned") == [line]
    assert len(set(line.glob("state_*")) - states) == 1  # the second iteration alone
