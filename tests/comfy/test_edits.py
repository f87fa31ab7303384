"""Edits that somebody has, in a real ComfyUI: Group from Images with the picture that they were made of."""

from __future__ import annotations

import shutil
import time
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from comfy_graphs import POLICY, REWARD, SAMPLER, SCORE, Graph, visual
from comfy_native_graphs import node
from comfy_results import equal, error_of, files, lora, tensors
from comfy_server import ComfyServer
from PIL import Image

from dgpo_core.people.gallery import read_gallery

MADE, TOLD = "made", "told"
SIZE = (66, 64)  # pixels; the embedded model draws 64 x 64, so that a little is cropped
ASKED = "make it red"


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Coloured fields, so that a shift by a few pixels is another picture."""
    fields = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(fields).resize(size, Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def loaded(comfy: ComfyServer) -> Graph:
    """The source; in one batch the source as it was and another picture; and a source that is wider."""
    pictures = {"before": picture(1), "other": picture(2), "wide": picture(3, (128, 64))}
    loads = {name: node("LoadImage", image=comfy.upload(made, f"{name}.png")) for name, made in pictures.items()}
    return {**loads, "both": node("ImageBatch", image1=["before", 0], image2=["other", 0])}


def scored(run: str, loaded: Graph, reward: str = "similarity", **inputs: Any) -> Graph:
    """LoadImage, Group from Images with a source, Reward Scorer; and what it scored."""
    graph = visual(run, Reward={"name": reward})
    given = {"images": ["both", 0], "prompt": ASKED, "policy": [POLICY, 0], "settings": [SAMPLER, 0]}
    given |= {"ratings": "", "iteration": 0, "source": ["before", 0], **inputs}
    graph[MADE] = node("DGPO_GroupFromImages", **{name: value for name, value in given.items() if value is not None})
    graph[SCORE]["inputs"]["groups"] = [MADE, 0]
    graph[TOLD] = node("PreviewAny", source=[SCORE, 1])
    wanted = (POLICY, SAMPLER, REWARD, SCORE, MADE, TOLD)
    return {**{name: graph[name] for name in wanted}, **loaded}


def training(run: str, loaded: Graph, **inputs: Any) -> Graph:
    """`scored`, and the trainer behind it."""
    return {**visual(run), **scored(run, loaded, **inputs)}


def test_edits_are_scored_by_how_much_of_the_source_they_keep(comfy: ComfyServer, loaded: Graph) -> None:
    entry = comfy.run(scored("kept", loaded))
    kept, other = (float(text) for text in entry["outputs"][TOLD]["text"])
    assert kept == pytest.approx(1.0, abs=1e-5)  # the source is cropped and scaled as its edit is
    assert other < 0.9


def test_the_sheets_show_the_source_before_its_edits(comfy: ComfyServer, loaded: Graph) -> None:
    outputs = comfy.run(scored("shown", loaded, source=["other", 0]))["outputs"]
    bare = comfy.run(scored("shown", loaded, "brightness", source=None))["outputs"]
    for one in (MADE, SCORE):
        sheet, plain = (comfy.view(found[one]["images"][0]) for found in (outputs, bare))
        step = sheet.width - plain.width  # a picture and the margin of 6 pixels
        pixels = np.asarray(sheet)[50:90].astype(int)  # below the texts; without the frames, which are of the scores
        source, first, second = (pixels[:, at + 9 : at + step - 9] for at in (6, 6 + step, 6 + 2 * step))
        assert np.abs(source - second).mean() < 5  # but for what a JPEG leaves out
        assert np.abs(source - first).mean() > 20


def test_who_ranks_edits_sees_the_source_and_the_answers_keep_it(comfy: ComfyServer, loaded: Graph) -> None:
    graph = scored("ranked", loaded)
    asked = {"mode": "rank", "timeout": 120, "on_timeout": "cancel", "preset": ""}
    graph[SCORE] = node("DGPO_HumanRanker", groups=[MADE, 0], **asked)
    graph[TOLD] = node("PreviewImage", images=[SCORE, 1])
    prompt, end, found = comfy.queue(graph), time.monotonic() + 120, []
    while not found:
        assert time.monotonic() < end, comfy.log()[-2000:]
        time.sleep(0.1)
        found = [q for q in comfy.get("/dgpo/questions")["questions"] if q["prompt_id"] == prompt]
    (group,) = found[0]["groups"]
    (shown,) = group["sources"]
    comfy.post(f"/dgpo/questions/{found[0]['token']}", {"groups": [{"ranking": [[1]]}]})
    comfy.wait(prompt)
    (kept,) = read_gallery(comfy.base / "output/dgpo/ranked/asked").groups
    seen = torch.from_numpy(np.array(comfy.view(shown).convert("RGB"))).permute(2, 0, 1) / 255
    assert (kept.prompt, kept.scores) == (ASKED, (-1.0, 1.0))
    assert torch.equal(kept.sources[0].image(), seen)
    assert tuple(seen.shape) == (3, 64, 64)


def test_scores_follow_the_source_and_rewards_that_look_at_none_are_as_without_it(
    comfy: ComfyServer, loaded: Graph
) -> None:
    told = [
        comfy.run(scored("keys", loaded, **source))["outputs"][TOLD]["text"]
        for source in ({}, {"source": ["other", 0]}, {"source": None, "reward": "brightness"})
    ]
    assert told[0] == told[1][::-1]
    assert told[2] == comfy.run(scored("keys", loaded, "brightness"))["outputs"][TOLD]["text"]


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (
            {"source": ["both", 0]},
            'Connect one picture to "picture before the edit" (source), not 2: all images of a group are made of the'
            " same one.",
        ),
        (
            {"source": ["wide", 0]},
            'The "picture before the edit" (source) is 128 x 64 pixels, and the images made of it are 66 x 64: connect'
            " the picture as it was edited, cropped to their proportions.",
        ),
        (
            {"source": None},
            "The reward similarity compares with the picture that was edited, and 'make it red' has none: connect one"
            ' to "picture before the edit" (source) of Group from Images, or to "pictures to edit" (images) of'
            " Prompts.",
        ),
    ],
)
def test_a_source_that_does_not_fit_is_one_sentence(
    comfy: ComfyServer, loaded: Graph, inputs: dict[str, Any], says: str
) -> None:
    assert error_of(comfy, scored("wrong", loaded, **inputs)).message == says


def test_edits_do_not_train_a_model_that_cannot_see_what_they_were_made_of(comfy: ComfyServer, loaded: Graph) -> None:
    error = error_of(comfy, training("blind", loaded))
    assert error.node_type == "DGPO_LoRATrainer"
    assert "draws from text alone: train one that edits" in error.message
    assert files(comfy, "blind") == {}


def test_an_editor_learns_from_edits_with_what_they_were_made_of(comfy: ComfyServer, loaded: Graph) -> None:
    shutil.copytree(tiny.folder("kontext"), comfy.base / "models" / "diffusers" / "kontext")

    def graph(source: str | None) -> Graph:
        made = training("editor", loaded, source=[source, 0] if source else None, reward="brightness")
        made[POLICY]["inputs"]["model"] = "diffusers/kontext"
        made[SAMPLER]["inputs"] |= {"height": tiny.SIZE, "width": tiny.SIZE}
        return made

    learned = [tensors(lora(comfy, comfy.run(graph(source)))) for source in ("before", "other")]
    assert not equal(*learned)
    assert error_of(comfy, graph(None)).message == (
        'A model of the family kontext edits pictures: connect the one that was edited to "picture before the edit"'
        " (source)."
    )


def test_the_embedded_editor_draws_its_edits_and_learns_from_them(comfy: ComfyServer) -> None:
    model, prompts = {"model": "embedded-editor (shapes world)"}, {"source": "embedded edits"}
    tensors(lora(comfy, comfy.run(visual("embedded_editor", LoadPolicy=model, Prompts=prompts))))
