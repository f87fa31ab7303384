"""What cannot work is told before the first picture: one error, at the node and the widget at fault, in their words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from comfy_graphs import DRAW, POLICY, PROMPTS, REWARD, SAMPLER, SCORE, SETTINGS, TRAIN, Graph, loop, visual
from comfy_results import error_of, files
from comfy_server import REPO, ComfyServer, PromptRefused, RequestFailed

OTHERS = {"Prompts": {"source": "the text below", "text": "a red fox"}}
NO_SCORES = "These groups have no scores: put a Reward Scorer, Scores from Graph or Human Ranker before."
T_MIN = '"trained steps" (t_min) is 7 but must be a noise level below 1 or a whole number'


def fault(comfy: ComfyServer, graph: Graph) -> tuple[str, str, str]:
    """The node, the widget and the sentence of the one error with which ComfyUI refuses a graph."""
    with pytest.raises(PromptRefused) as refused:
        comfy.queue(graph)
    ((node, said),) = refused.value.node_errors.items()
    (error,) = said["errors"]
    name, _, text = error["details"].partition(" - ")
    assert error["extra_info"]["input_name"] == name
    return node, name, text


FAULTS: list[tuple[str, str, str, dict[str, Any]]] = [
    (SETTINGS, "t_min", T_MIN, {"SamplerSettings": {"steps": 4}}),
    (SETTINGS, "t_min", T_MIN, {"SamplerSettings": {"steps": 4}, "TrainingSettings": {"preset": "quickstart"}}),
    (SETTINGS, "timesteps", '"noise levels each" (timesteps) is 9', {"TrainingSettings": {"timesteps": 9}}),
    (SETTINGS, "betas", "betas", {"TrainingSettings": {"betas": "a lot"}}),
    (SAMPLER, "solver", "use one of euler, heun, dpmpp_2m, uni_pc.", {"SamplerSettings": {"solver": "ddim"}}),
    (
        SAMPLER,
        "height",
        "have multiples of 16",
        {"SamplerSettings": {"height": 72}},
    ),
    (SAMPLER, "width", "at most 256 pixels a side", {"SamplerSettings": {"width": 4096, "height": 64}}),
    (REWARD, "name", "'a red fox' has none: take those prompts, or a reward that judges any", OTHERS),
    (REWARD, "weight", "must be a number other than 0", {"Reward": {"weight": 0.0}}),
    (REWARD, "only_if", "asks for ocr, which is not among the rewards", {"Reward": {"only_if": "ocr > 0.5"}}),
    (POLICY, "run", "cannot be a folder name", {"LoadPolicy": {"run": "a/b"}}),
    (POLICY, "model", "There is no model checkpoints/gone", {"LoadPolicy": {"model": "checkpoints/gone.safetensors"}}),
    (PROMPTS, "text", "", {"Prompts": {"source": "the text below", "text": "# nothing"}}),
    (PROMPTS, "source", "gone.txt", {"Prompts": {"source": "gone.txt"}}),
    (PROMPTS, "source", "is outside of ComfyUI's input folder", {"Prompts": {"source": "a\0b"}}),
    (POLICY, "model", "It has no value: choose or write one.", {"LoadPolicy": {"model": None}}),
    (POLICY, "model", "True is no text: choose or write one.", {"LoadPolicy": {"model": True}}),
    (SETTINGS, "preset", "It has no value", {"TrainingSettings": {"preset": None}}),
    (SAMPLER, "negative_prompt", "holds half a character", {"SamplerSettings": {"negative_prompt": "a \ud800"}}),
    (
        PROMPTS,
        "text",
        "there is no file for the wildcard __gone__",
        {
            "Prompts": {"source": "the text below", "text": "a __gone__ circle", "wildcards": 2},
            "Reward": {"name": "brightness"},
        },
    ),
]


@pytest.mark.parametrize(("node", "name", "text", "inputs"), FAULTS, ids=[f"{i}_{f[1]}" for i, f in enumerate(FAULTS)])
@pytest.mark.parametrize("make", [loop, visual])
def test_one_error_at_the_widget_at_fault(
    comfy: ComfyServer, make: Any, node: str, name: str, text: str, inputs: dict[str, Any]
) -> None:
    if "run" in inputs.get("LoadPolicy", {}):
        graph = make("a/b", 2) if make is loop else make("a/b")
    else:
        graph = make("faulty", 2, **inputs) if make is loop else make("faulty", **inputs)
    found = fault(comfy, graph)
    assert found[:2] == (node, name)
    assert text in found[2]
    assert files(comfy, "faulty") == {}


def test_what_is_measured_besides_needs_test_prompts_and_another_reward(comfy: ComfyServer) -> None:
    graph = loop("faulty", 2)
    graph["other"] = {"class_type": "DGPO_Reward", "inputs": {**graph[REWARD]["inputs"], "name": "brightness"}}
    graph[TRAIN]["inputs"]["watch"] = ["other", 0]
    assert fault(comfy, graph)[:2] == (TRAIN, "watch")
    graph[TRAIN]["inputs"] |= {"watch": [REWARD, 0], "held_out": [PROMPTS, 0]}
    assert "is trained, so it cannot be measured besides" in fault(comfy, graph)[2]


def test_a_scorer_and_a_reward_that_are_missing_are_told_before_anything_is_drawn(comfy: ComfyServer) -> None:
    """As after a bypass of the Reward Scorer, or of the reward that stands in for a person."""
    unscored = visual("unscored", LoRATrainer={"scored": [DRAW, 0]})
    del unscored[SCORE]
    assert fault(comfy, unscored) == (TRAIN, "scored", NO_SCORES)
    asking = visual("nobody")
    late = {"mode": "rank", "timeout": 1, "on_timeout": "use a reward"}
    asking[SCORE] = {"class_type": "DGPO_HumanRanker", "inputs": {"groups": [DRAW, 0], **late}}
    node, name, text = fault(comfy, asking)
    assert (node, name) == (SCORE, "reward")
    assert text.startswith("Connect a reward, or set")


def test_a_graph_that_cannot_be_read_is_left_to_comfyui(comfy: ComfyServer) -> None:
    for graph in (
        {TRAIN: {"class_type": "DGPO_TrainingLoop"}},
        {"1": 7},
        {"1": {"class_type": "DGPO_LoRATrainer", "inputs": 3}},
    ):
        with pytest.raises(Exception, match="gave|refused|error"):
            comfy.queue(graph)
    with pytest.raises(RequestFailed) as refused:  # by ComfyUI, which finds no graph in it
        comfy.request("POST", "/prompt", b"[]")
    assert refused.value.status == 400
    circle = visual("circle")
    circle[DRAW]["inputs"]["policy"] = [DRAW, 0]
    with pytest.raises(PromptRefused):
        comfy.queue(circle)


def test_what_comes_over_a_link_is_not_judged_before_it_is_known(comfy: ComfyServer) -> None:
    graph = visual("linked", SamplerSettings={"steps": 4})
    graph["four"] = {"class_type": "PrimitiveFloat", "inputs": {"value": 4.0}}
    graph[SETTINGS]["inputs"]["t_min"] = ["four", 0]
    assert comfy.run(graph)["status"]["status_str"] == "success"


def test_prompts_with_pictures_over_a_link_are_judged_by_a_reward_that_compares_with_them(comfy: ComfyServer) -> None:
    graph = visual("edits", **OTHERS, Reward={"name": "similarity"})
    graph["grey"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 128}}
    graph[PROMPTS]["inputs"]["images"] = ["grey", 0]
    error = error_of(comfy, graph)
    assert error.node_type == "DGPO_GroupSampler"  # it runs: the embedded model alone cannot edit
    del graph[PROMPTS]["inputs"]["images"]
    assert fault(comfy, graph)[:2] == (REWARD, "name")


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("judge", {"source": "the text below", "text": "a red fox"}),
        ("run", {"run": "CON"}),
        ("source", {"source": "gone.txt"}),
        ("model", {"model": "checkpoints/gone.safetensors"}),
    ],
)
def test_teach_tells_its_own_faults_at_the_widget(comfy: ComfyServer, name: str, inputs: dict[str, Any]) -> None:
    graph: Graph = json.loads((REPO / "workflows" / "api" / "start_here.json").read_text("utf-8"))
    graph["1"]["inputs"] |= inputs
    assert fault(comfy, graph)[:2] == ("1", name)


def test_a_wildcard_draws_what_its_words_draw(comfy: ComfyServer) -> None:
    folder = comfy.base / "input" / "wildcards"
    folder.mkdir()
    (folder / "colour.txt").write_text("red\n", "utf-8")

    def sheet(run: str, text: str, **more: Any) -> bytes:
        given = {"source": "the text below", "text": text, **more}
        entry = comfy.run(visual(run, Prompts=given, Reward={"name": "brightness"}))
        return comfy.view(entry["outputs"][SCORE]["images"][0]).tobytes()

    plain = sheet("words", "a red circle")
    assert sheet("words", "a __colour__ {circle|circle}", wildcards=3) == plain
    assert sheet("words", "a __colour__ {circle|circle}") != plain  # taken as words
    (folder / "colour.txt").write_text("blue\n", "utf-8")
    assert sheet("words", "a __colour__ {circle|circle}", wildcards=3) == sheet("words", "a blue circle")
