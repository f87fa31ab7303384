"""Training in a real ComfyUI: a state is what its settings make of it, however and how often it is asked for."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_graphs import DRAW, POLICY, SAVE, SETTINGS, TRAIN, chain, loop, visual, workflow
from comfy_results import equal, error_of, files, headless, line, lora, tensors
from comfy_server import ComfyServer, images
from safetensors.torch import save_file


def test_the_same_queue_twice_trains_once(comfy: ComfyServer) -> None:
    first = comfy.run(visual("twice"))
    before = files(comfy, "twice")
    trained = len(comfy.events.of("progress"))
    second = comfy.run(visual("twice"))
    assert lora(comfy, second) == lora(comfy, first)
    assert files(comfy, "twice") == before
    assert len(comfy.events.of("progress")) == trained
    comfy.run(visual("other_run"))  # and what ComfyUI remembers is gone
    comfy.free()
    third = comfy.run(visual("twice"))
    assert lora(comfy, third) == lora(comfy, first)
    assert files(comfy, "twice") == before


def test_another_seed_starts_from_the_clean_state_and_the_first_comes_back(comfy: ComfyServer) -> None:
    def run(name: str, seed: int) -> list[bytes]:
        graphs = [visual(name, i, LoadPolicy={"run_seed": seed}) for i in (0, 1)]
        return [lora(comfy, comfy.run(graph)) for graph in graphs]

    first, other = run("seeds", 0), run("seeds", 1)
    assert not equal(tensors(first[1]), tensors(other[1]))
    assert run("seeds", 0) == first
    alone = run("seed_alone", 1)  # as if there had never been another
    assert all(equal(tensors(a), tensors(b)) for a, b in zip(alone, other, strict=True))


def test_an_earlier_output_used_again_gives_the_earlier_state(comfy: ComfyServer) -> None:
    graph = visual("chained")
    graph |= chain(graph, "b", POLICY, TRAIN)
    graph |= chain(graph, "c", POLICY, TRAIN)  # the first state once more, after the second was made
    graph["c" + DRAW]["inputs"]["iteration"] = 2
    show = {"class_type": "SaveImage", "inputs": {"images": ["c" + DRAW, 1], "filename_prefix": "chained"}}
    entry = comfy.run({**graph, "show": show})
    drawn = [comfy.view(image).tobytes() for image in images({"outputs": {"show": entry["outputs"]["show"]}})]

    steps = [lora(comfy, comfy.run(visual("queued", i))) for i in (0, 1)]
    assert equal(tensors(lora(comfy, entry)), tensors(steps[0]))
    assert equal(tensors(lora(comfy, entry, "b" + SAVE)), tensors(steps[1]))

    graph["b" + SETTINGS] = workflow("visual_loop", TrainingSettings={"lr": 0.5})[SETTINGS]
    graph["b" + TRAIN]["inputs"]["settings"] = ["b" + SETTINGS, 0]
    again = comfy.run({**graph, "show": show})  # whatever came of the second step
    assert not equal(tensors(lora(comfy, again, "b" + SAVE)), tensors(steps[1]))
    assert lora(comfy, again) == lora(comfy, entry)
    assert [comfy.view(i).tobytes() for i in images({"outputs": {"show": again["outputs"]["show"]}})] == drawn


def test_the_first_iteration_again_after_three_is_the_first(comfy: ComfyServer) -> None:
    made = [lora(comfy, comfy.run(visual("again", i))) for i in range(3)]
    assert len({hashlib.sha256(content).digest() for content in made}) == 3
    assert lora(comfy, comfy.run(visual("again", 0))) == made[0]
    comfy.run(visual("again", 3))  # and it goes on from where it was
    assert len(line(comfy, "again")) == 4


def test_queued_iterations_the_loop_and_the_engine_train_the_same(comfy: ComfyServer, tmp_path: Path) -> None:
    queued = [comfy.run(visual("by_queue", i)) for i in range(3)][-1]
    comfy.run(visual("by_other", 0, LoadPolicy={"run_seed": 9}))  # nothing of it is in memory any more
    looped = comfy.run(loop("by_loop", 3))
    assert line(comfy, "by_loop") == line(comfy, "by_queue")
    weights = tensors(lora(comfy, queued))
    assert equal(tensors(lora(comfy, looped)), weights)
    assert equal(headless(loop("by_engine", 3), 3, tmp_path), weights)
    assert equal(headless(visual("by_engine"), 3, tmp_path), weights)


@pytest.mark.parametrize(
    "inputs",
    [
        {"LoRATrainer": {"weights": "current"}},
        {"SamplerSettings": {"solver": "heun", "cfg": 2.0, "negative_prompt": "a red circle", "batch": 3}},
        {"LoadPolicy": {"dropout": 0.2}, "TrainingSettings": {"kl_cfg": 2.0, "clip": 0.01, "reference": "old"}},
    ],
)
def test_other_settings_too_train_as_in_the_engine(comfy: ComfyServer, tmp_path: Path, inputs: Any) -> None:
    graph = loop(f"engine_{hashlib.sha256(str(inputs).encode()).hexdigest()[:6]}", 2, **inputs)
    entry = comfy.run(graph)
    assert equal(headless(graph, 2, tmp_path), tensors(lora(comfy, entry)))


def test_two_policies_take_turns_in_one_graph(comfy: ComfyServer) -> None:
    """One model is in memory at a time: each goes out for the other and comes back as it was."""
    graph = visual("turns")
    graph["other"] = json.loads(json.dumps(graph[POLICY]))
    graph["other"]["inputs"]["run_seed"] = 1
    graph |= chain(graph, "a2", POLICY, TRAIN)
    graph |= chain(graph, "b1", "other")
    graph |= chain(graph, "b2", "other", "b1" + TRAIN)
    entry = comfy.run(graph)
    for seed, nodes in ((0, (SAVE, "a2" + SAVE)), (1, ("b1" + SAVE, "b2" + SAVE))):
        alone = [lora(comfy, comfy.run(visual(f"alone_{seed}", i, LoadPolicy={"run_seed": seed}))) for i in (0, 1)]
        together = [lora(comfy, entry, node) for node in nodes]
        assert [equal(tensors(a), tensors(b)) for a, b in zip(alone, together, strict=True)] == [True, True]


def test_two_runs_of_the_same_settings_have_states_of_their_own(comfy: ComfyServer) -> None:
    comfy.run(visual("one"))
    comfy.run(visual("two"))
    comfy.run(visual("two", 1))
    assert line(comfy, "two")[:1] == line(comfy, "one")
    assert set(line(comfy, "two")) <= {re.sub(r"state_|\.safetensors", "", name) for name in files(comfy, "two")}


def test_memory_settings_go_on_with_the_same_states(comfy: ComfyServer) -> None:
    comfy.run(visual("memory"))
    thrifty = {"LoadPolicy": {"gradient_checkpointing": True, "offload": True}}
    comfy.run(visual("memory", 1, **thrifty))
    assert len(line(comfy, "memory")) == 2


def test_a_run_starts_from_a_trained_lora(comfy: ComfyServer) -> None:
    name = comfy.run(visual("starter", LoRATrainer={"weights": "current"}))["outputs"][SAVE]["text"][0]
    content = lora(comfy, comfy.run(visual("started", LoadPolicy={"start_from": name})))
    assert line(comfy, "started") != line(comfy, "starter")
    assert not equal(tensors(content), tensors(lora(comfy, comfy.run(visual("starter")))))
    assert str(comfy.base).encode() not in content  # nothing of this machine in a file that is given away


def test_a_policy_that_cannot_be_loaded_does_no_harm(comfy: ComfyServer) -> None:
    first = comfy.run(visual("unharmed"))
    save_file(
        {"transformer.none.lora_A.weight": torch.ones(4, 4)}, comfy.base / "models" / "loras" / "misfit.safetensors"
    )
    error_of(comfy, visual("unharmed", LoadPolicy={"start_from": "misfit.safetensors"}))
    comfy.run(visual("unharmed", 1))
    assert lora(comfy, comfy.run(visual("unharmed"))) == lora(comfy, first)
