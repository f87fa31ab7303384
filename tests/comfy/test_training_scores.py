"""Scores from elsewhere in a real ComfyUI: of other nodes, of a text, and ratings of pictures from anywhere."""

from __future__ import annotations

import re
from typing import Any

import pytest
from comfy_graphs import DRAW, POLICY, SAMPLER, SCORE, TRAIN, Graph, visual
from comfy_results import equal, error_of, line, lora, tensors
from comfy_server import ComfyServer
from PIL import Image


def from_graph(run: str, source: Graph, link: list[Any]) -> Graph:
    """The visual loop with Scores from Graph in place of the scorer."""
    graph = visual(run, SamplerSettings={"group_size": 4})
    scorer = {"groups": [DRAW, 0], "scores": link, "name": "mine"}
    show = {"class_type": "PreviewAny", "inputs": {"source": [TRAIN, 4]}}
    graph[SCORE + "0"] = graph[SCORE]
    graph[SCORE] = {"class_type": "DGPO_ScoresFromGraph", "inputs": scorer}
    return {**graph, **source, "show": show}


TO_MASK = {"mask": {"class_type": "ImageToMask", "inputs": {"image": [DRAW, 1], "channel": "red"}}}
WRITTEN = {"text": {"class_type": "PrimitiveString", "inputs": {"value": "1, 2.5; 3\n-4"}}}


@pytest.mark.parametrize(
    ("name", "source", "link"),
    [("mask", TO_MASK, ["mask", 0]), ("floats", {}, [SCORE + "0", 1]), ("text", WRITTEN, ["text", 0])],
)
def test_scores_come_from_any_node(comfy: ComfyServer, name: str, source: Graph, link: list[Any]) -> None:
    entry = comfy.run(from_graph(f"from_{name}", source, link))
    metrics = entry["outputs"]["show"]["text"][0]
    reward = float(re.search(r"^reward/mine: (.+)$", metrics, re.MULTILINE)[1])
    assert name != "text" or reward == pytest.approx((1 + 2.5 + 3 - 4) / 4)
    tensors(lora(comfy, entry))


def test_a_wrong_count_of_scores_is_one_sentence(comfy: ComfyServer) -> None:
    few = {"text": {"class_type": "PrimitiveString", "inputs": {"value": "1 2 3"}}}
    message = error_of(comfy, from_graph("few", few, ["text", 0])).message
    assert message == "There are 3 scores for 4 images: give one number per image."


@pytest.fixture(scope="module")
def pictures(comfy: ComfyServer) -> Graph:
    """Two pictures of another size than the model's, in one batch."""
    names = [comfy.upload(Image.new("RGB", (105, 100), colour), f"{colour}.png") for colour in ("red", "blue")]
    loads = {name: {"class_type": "LoadImage", "inputs": {"image": name}} for name in names}
    both = {"image1": [names[0], 0], "image2": [names[1], 0]}
    return {**loads, "both": {"class_type": "ImageBatch", "inputs": both}}


def rated(run: str, pictures: Graph, iteration: int = 0, **inputs: Any) -> Graph:
    """The visual loop with rated pictures in place of drawn ones."""
    graph = visual(run)
    given = {"images": ["both", 0], "prompt": "a red circle", "policy": [POLICY, 0], "settings": [SAMPLER, 0]}
    given |= {"ratings": "5 1", "iteration": iteration, **inputs}
    graph[SCORE] = {"class_type": "DGPO_GroupFromImages", "inputs": given}
    del graph[DRAW]
    return {**graph, **pictures}


def test_a_group_of_pictures_trains(comfy: ComfyServer, pictures: Graph) -> None:
    made = [tensors(lora(comfy, comfy.run(rated("pictures", pictures, i)))) for i in (0, 1)]
    assert not equal(*made)
    assert len(line(comfy, "pictures")) == 2


def test_pictures_without_ratings_are_for_a_node_that_scores(comfy: ComfyServer, pictures: Graph) -> None:
    graph = rated("unrated", pictures, ratings=" ")
    error = error_of(comfy, graph)
    assert error.node_type == "DGPO_LoRATrainer"
    assert error.message.startswith("These groups have no scores: put a Reward Scorer")
    behind = {"groups": [SCORE, 0], "scores": ["text", 0], "name": "mine"}
    graph["text"] = {"class_type": "PrimitiveString", "inputs": {"value": "5 1"}}
    graph["behind"] = {"class_type": "DGPO_ScoresFromGraph", "inputs": behind}
    graph[TRAIN]["inputs"]["scored"] = ["behind", 0]
    made = tensors(lora(comfy, comfy.run(graph)))
    assert equal(made, tensors(lora(comfy, comfy.run(rated("unrated_rated", pictures)))))


def test_ratings_that_hold_no_number_are_refused(comfy: ComfyServer, pictures: Graph) -> None:
    message = error_of(comfy, rated("no_number", pictures, ratings="good, bad")).message
    assert message == "There are 0 scores for 2 images: give one number per image."


def test_pictures_of_another_shape_are_refused_not_cropped(comfy: ComfyServer) -> None:
    tall = comfy.upload(Image.new("RGB", (100, 150)), "tall.png")
    pictures = {"both": {"class_type": "LoadImage", "inputs": {"image": tall}}}
    message = error_of(comfy, rated("tall", pictures, ratings="1")).message
    assert message.startswith("The images are 100 x 150 pixels, and the settings train 64 x 64, where a crop")


def test_groups_of_pictures_are_trained_together(comfy: ComfyServer, pictures: Graph) -> None:
    graph = rated("joined", pictures, ratings="1 5", prompt="a blue square")
    graph["first"] = rated("joined", pictures)[SCORE]
    graph[SCORE]["inputs"]["groups"] = ["first", 0]
    both = lora(comfy, comfy.run(graph))
    one = lora(comfy, comfy.run(rated("joined", pictures)))
    assert not equal(tensors(both), tensors(one))


def test_other_sampler_settings_are_another_step_on_pictures(comfy: ComfyServer, pictures: Graph) -> None:
    made = []
    for steps in (8, 12):
        graph = rated("levels", pictures)
        graph[SAMPLER]["inputs"]["steps"] = steps
        made.append(tensors(lora(comfy, comfy.run(graph))))
    assert not equal(*made)
