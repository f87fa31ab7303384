"""What a training in a real ComfyUI refuses, and what goes wrong in it: one sentence, and nothing is left."""

from __future__ import annotations

import json
from typing import Any

import pytest
from comfy_graphs import DRAW, POLICY, REWARD, SAMPLER, SAVE, Graph, loop, visual
from comfy_results import error_of, files, line
from comfy_server import ComfyServer, ExecutionFailed, PromptRefused


def test_too_far_is_told_in_one_sentence(comfy: ComfyServer) -> None:
    comfy.run(visual("far"))
    error = error_of(comfy, visual("far", 7))
    assert error.node_type == "DGPO_GroupSampler"
    assert error.message == (
        "Run 'far' with these settings has made 1 iteration, so iteration 7 cannot follow: set the iteration to 1, or"
        " to 0 to start anew."
    )


def test_an_error_in_a_reward_is_one_sentence_and_leaves_nothing(comfy: ComfyServer) -> None:
    unknown = {"Reward": {"options": '{"colour": "red"}'}}
    for graph in (visual("bad_reward", **unknown), loop("bad_reward", 2, **unknown)):
        with pytest.raises(PromptRefused) as refused:
            comfy.run(graph)
        (error, *_) = refused.value.node_errors[REWARD]["errors"]
        assert "Reward 'shapes_graded' does not take these options: " in error["details"]
        assert files(comfy, "bad_reward") == {}
    comfy.run(visual("bad_reward"))


def test_a_prompt_that_cannot_be_judged_is_told_before_the_loop_draws(comfy: ComfyServer) -> None:
    path = comfy.base / "input" / "one_bad.jsonl"
    path.write_text(json.dumps({"prompt": "no facts"}), "utf-8")
    graph = loop("bad_prompt", 4, Prompts={"source": path.name})
    with pytest.raises(PromptRefused) as refused:
        comfy.run(graph)
    ((node, said),) = refused.value.node_errors.items()
    assert node == REWARD
    assert "'no facts' has none" in said["errors"][0]["details"]
    assert files(comfy, "bad_prompt") == {}


@pytest.mark.parametrize("run", ["../x", "/x", "a/b", "a\\b", "..", ".", ".hidden", "", " ", "a\nb", "x" * 300, "a:b"])
def test_run_names_outside_the_folder_are_refused(comfy: ComfyServer, run: str) -> None:
    with pytest.raises(PromptRefused) as refused:
        comfy.run(visual(run))
    (error, *_) = refused.value.node_errors[POLICY]["errors"]
    assert "cannot be a folder name" in error["details"]


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("Prompts", {"source": "../outside.txt"}),
        ("Prompts", {"source": "/etc/hostname"}),
        ("Prompts", {"source": "gone.txt"}),
        ("Prompts", {"source": "the text below", "text": "# nothing"}),
        ("LoadPolicy", {"model": "checkpoints/../../outside.safetensors"}),
        ("LoadPolicy", {"model": "/etc/hostname"}),
        ("LoadPolicy", {"start_from": "../outside.safetensors"}),
        ("Reward", {"options": "{"}),
    ],
)
def test_files_outside_the_folders_and_nonsense_are_refused(comfy: ComfyServer, kind: str, inputs: Any) -> None:
    for folder in (comfy.base, comfy.base / "models"):
        (folder / "outside.txt").write_text("a red circle")
        (folder / "outside.safetensors").write_bytes(b"")
    with pytest.raises(PromptRefused) as refused:
        comfy.run(visual("refused", **{kind: inputs}))
    assert [error["class_type"] for error in refused.value.node_errors.values()] == [f"DGPO_{kind}"]
    assert files(comfy, "refused") == {}


@pytest.mark.parametrize("name", ["../outside", "/outside", "..", ""])
def test_a_lora_is_saved_nowhere_else(comfy: ComfyServer, name: str) -> None:
    answer = comfy.post("/prompt", {"prompt": visual("saved", SaveLoRA={"name": name})})
    assert list(answer["node_errors"]) == [SAVE]  # ComfyUI runs the other outputs all the same
    assert SAVE not in comfy.wait(answer["prompt_id"])["outputs"]


def test_a_connected_run_name_is_checked_when_it_is_known(comfy: ComfyServer) -> None:
    def graph(name: str) -> Graph:
        source = {"class_type": "PrimitiveString", "inputs": {"value": name}}
        linked = visual("")
        linked[POLICY]["inputs"]["run"] = ["name", 0]
        return {**linked, "name": source}

    comfy.run(graph("connected"))
    assert len(line(comfy, "connected")) == 1
    assert "cannot be a folder name" in error_of(comfy, graph("../x")).message


def test_half_a_character_in_an_error_does_not_stop_the_queue(comfy: ComfyServer) -> None:
    """No log can write one, and ComfyUI's thread that runs the queue ends where its log cannot write an error."""
    graph = visual("half")
    graph["text"] = {"class_type": "PrimitiveString", "inputs": {"value": "\ud800"}}
    graph[POLICY]["inputs"]["targets"] = ["text", 0]
    assert "on the targets \\ud800." in error_of(comfy, graph).message
    comfy.run(visual("half"), timeout=60)


def test_an_error_keeps_inputs_in_few_words_in_the_history(comfy: ComfyServer) -> None:
    prompts = "\n".join(f"a lamp, {number}" for number in range(2000))
    graph = loop("many", 1, Prompts={"source": "the text below", "text": prompts}, LoadPolicy={"targets": "none such"})
    graph[REWARD]["inputs"]["name"] = "brightness"
    prompt = comfy.queue(graph)
    entry = comfy.wait(prompt, allow_failure=True)
    (error,) = [told for kind, told in entry["status"]["messages"] if kind == "execution_error"]
    assert error["current_inputs"]["prompts"] == ["2000 prompts, 1 an iteration"]


def test_a_preset_that_does_not_exist_is_told(comfy: ComfyServer) -> None:
    """0.3.64 takes any text for a choice, later ones look into the list."""
    with pytest.raises(
        (ExecutionFailed, PromptRefused), match="There is no preset none such: choose|none such.*not in"
    ):
        comfy.run(visual("no_preset", TrainingSettings={"preset": "none such"}))


def test_groups_that_come_without_scores_by_a_long_way_are_refused_plainly(comfy: ComfyServer) -> None:
    """Not straight from the Group Sampler, which is told before anything is drawn."""
    graph = visual("unscored", LoRATrainer={"scored": ["either", 0]})
    graph["either"] = {"class_type": "DGPO_GroupFromImages", "inputs": {
        "images": [DRAW, 1], "prompt": "a circle", "policy": [POLICY, 0], "settings": [SAMPLER, 0], "ratings": "",
        "iteration": 0,
    }}  # fmt: skip
    error = error_of(comfy, graph)
    assert error.node_type == "DGPO_LoRATrainer"
    assert error.message.startswith("These groups have no scores: put a Reward Scorer")


def test_groups_of_another_policy_are_refused_plainly(comfy: ComfyServer) -> None:
    graph = visual("mixed", LoRATrainer={"policy": ["other", 0]})
    graph["other"] = visual("mixed", LoadPolicy={"run_seed": 3})[POLICY]
    assert error_of(comfy, graph).message.startswith("The groups are of another policy")
