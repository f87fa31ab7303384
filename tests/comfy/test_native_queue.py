"""The native policy in the queue of a real ComfyUI, between ordinary pictures: nothing is mixed up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from comfy_checkpoint import checkpoint
from comfy_graphs import Graph
from comfy_native_graphs import graph, ksampler
from comfy_results import cancel, equal, lora, tensors
from comfy_server import REPO, ComfyServer, ExecutionFailed, PromptRefused
from safetensors.torch import save_file

from dgpo_core.common.seeds import derive_seed

STEPS = ("loader", "policy", "prompts", "settings", "groups", "reward", "scores", "training", "trainer", "save")
USERS_LORA = {
    "class_type": "LoraLoaderModelOnly",
    "inputs": {"model": ["loader", 0], "lora_name": "users.safetensors", "strength_model": 1.0},
}


def users_model(comfy: ComfyServer) -> None:
    """A checkpoint, and a LoRA of the user's for it."""
    checkpoint(comfy)
    generator, prefix = torch.Generator().manual_seed(0), "diffusion_model.input_blocks.1.1.transformer_blocks.0"
    layer = f"{prefix}.attn1.to_v"
    parts = {"lora_A": (4, 320), "lora_B": (320, 4)}
    state = {f"{layer}.{part}.weight": 0.1 * torch.randn(shape, generator=generator) for part, shape in parts.items()}
    save_file(state, comfy.base / "models" / "loras" / "users.safetensors")


def training(run: str, iteration: int, **inputs: Mapping[str, Any]) -> Graph:
    """One iteration without the pictures beside it; `inputs` are by node."""
    found = {name: node for name, node in graph(iteration).items() if name in STEPS}
    found["policy"]["inputs"]["run"] = run
    for name, values in inputs.items():
        found[name]["inputs"].update(values)
    return found


def picture(seed: int, model: tuple[str, int] = ("loader", 0), **settings: Any) -> Graph:
    """An ordinary picture of a model."""
    found = ksampler("plain", list(model))
    found["plain sampler"]["inputs"].update(settings, seed=seed)
    return {"loader": graph(0)["loader"], "user": USERS_LORA, **found}


def pixels(comfy: ComfyServer, entry: Mapping[str, Any], node: str = "plain") -> list[bytes]:
    return [comfy.view(image).tobytes() for image in entry["outputs"][node]["images"]]


def test_the_group_sampler_draws_what_ksampler_draws_for_each_seed(comfy: ComfyServer) -> None:
    """With a LoRA on the MODEL, a negative prompt and guidance."""
    users_model(comfy)
    settings = {"solver": "dpmpp_2m", "scheduler": "karras", "steps": 3, "cfg": 2.5, "negative_prompt": "a lamp"}
    group = training("seeds", 0, settings=settings, policy={"model": ["user", 0]})
    group["user"] = USERS_LORA
    group["drawn"] = {"class_type": "PreviewImage", "inputs": {"images": ["groups", 1]}}
    ours = pixels(comfy, comfy.run(group), "drawn")
    drawn = {"sampler_name": "dpmpp_2m", "scheduler": "karras", "steps": 3, "cfg": 2.5}
    theirs = [
        pixels(comfy, comfy.run(picture(derive_seed(0, "rollout", 0, 0, i), ("user", 0), **drawn)))[0] for i in range(4)
    ]
    assert ours == theirs
    assert len(set(ours)) == 4


def test_a_sampler_that_adds_noise_is_refused_before_anything_runs(comfy: ComfyServer) -> None:
    checkpoint(comfy)
    for settings, says in (
        ({"solver": "euler_ancestral"}, "adds noise while it samples, but DGPO needs a deterministic one: use 'euler'"),
        ({"solver": "er_sde"}, "use 'dpmpp_2m'"),
        ({"scheduler": "nothing"}, "ComfyUI has no scheduler 'nothing'"),
    ):
        with pytest.raises(PromptRefused) as refused:
            comfy.queue(training("noisy", 0, settings=settings))
        assert says in json.dumps(refused.value.node_errors["settings"])


def test_a_scheduler_is_refused_by_a_policy_of_diffusers(comfy: ComfyServer) -> None:
    found: Graph = json.loads((REPO / "workflows" / "api" / "visual_loop.json").read_text("utf-8"))
    for node in found.values():
        if node["class_type"] == "DGPO_SamplerSettings":
            node["inputs"]["scheduler"] = "karras"
    with pytest.raises(ExecutionFailed, match="is one of ComfyUI's, for native policies"):
        comfy.run(found)


def test_two_trainings_of_one_checkpoint_and_ordinary_pictures_share_a_queue(comfy: ComfyServer) -> None:
    """Queued at once and in turns, each gives what it gives alone, with all models loaded anew."""
    checkpoint(comfy)
    runs = {"one": {"run_seed": 0}, "other": {"run_seed": 1}}
    queued = {}
    for iteration in (0, 1):
        for number, (run, policy) in enumerate(runs.items()):
            seed = 10 * iteration + number
            queued[seed] = comfy.queue(picture(seed))
            queued[run, iteration] = comfy.queue(training(f"mixed_{run}", iteration, policy=policy))
    found = {key: comfy.wait(prompt) for key, prompt in queued.items()}
    comfy.free()
    learned = []
    for run, policy in runs.items():
        for iteration in (0, 1):
            alone = tensors(lora(comfy, comfy.run(training(f"alone_{run}", iteration, policy=policy)), "save"))
            assert equal(tensors(lora(comfy, found[run, iteration], "save")), alone)
            learned.append(alone)
    assert not any(equal(one, other) for i, one in enumerate(learned) for other in learned[:i])
    comfy.free()
    for seed in (0, 1, 10, 11):
        assert pixels(comfy, found[seed]) == pixels(comfy, comfy.run(picture(seed)))


def test_a_training_goes_on_after_the_models_were_loaded_again(comfy: ComfyServer) -> None:
    """What a file of SD1.5 lacks is whatever was in memory: another number each time that it is loaded."""
    checkpoint(comfy)
    comfy.run(training("kept", 0))
    for iteration in (1, 2):
        waiting = comfy.queue(picture(iteration))
        comfy.free()  # the worker looks after this picture
        comfy.wait(waiting)
        comfy.run(training("kept", iteration))


def test_cancel_leaves_the_model_and_the_users_lora_as_they_were(comfy: ComfyServer) -> None:
    users_model(comfy)
    models = (("loader", 0), ("user", 0))
    before = [pixels(comfy, comfy.run(picture(3, model))) for model in models]
    assert before[0] != before[1]
    slow = {"settings": {"group_size": 16}, "training": {"micro_batch": 1, "timesteps": 3}}
    for turn, node in enumerate(("groups", "trainer"), start=1):  # while it draws, and while it trains
        steps = {"settings": {"group_size": 16, "steps": 100}} if node == "groups" else {}
        run = training("stopped", 0, **{**slow, **steps}, policy={"model": ["user", 0]})
        cancel(comfy, {**run, "user": USERS_LORA}, node)
        again = {"denoise": 1 - turn * 1e-6}  # the same to KSampler, but nothing that ComfyUI remembers
        assert [pixels(comfy, comfy.run(picture(3, model, **again))) for model in models] == before
