"""Teach in a real ComfyUI: the Training Loop's steps with its keys, ended by minutes, by a button, or by a person."""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any

import pytest
from comfy_graphs import Graph
from comfy_results import files, line, lora
from comfy_server import REPO, ComfyServer, ExecutionFailed

from dgpo_core.settings.presets import load_preset

MOMENT = 0.1  # minutes


def teach(run: str, minutes: float = MOMENT, **inputs: Any) -> Graph:
    """The template, without what compares."""
    graph: Graph = json.loads((REPO / "workflows" / "api" / "start_here.json").read_text("utf-8"))
    graph["1"]["inputs"] |= {"run": run, "minutes": minutes, **inputs}
    return {key: node for key, node in graph.items() if node["class_type"] != "DGPO_BeforeAfter"}


def said(entry: dict[str, Any]) -> str:
    return entry["outputs"]["1"]["text"][0]


def answer_all(server: ComfyServer, prompt: str) -> int:
    """Says of every question that the first picture is the best, until the graph is done; how many there were."""
    asked: set[str] = set()
    while prompt not in server.get(f"/history/{prompt}"):
        for question in server.get("/dgpo/questions")["questions"]:
            asked.add(question["token"])
            groups = [{"ranking": [[0]]} for _ in question["groups"]]
            server.post(f"/dgpo/questions/{question['token']}", {"token": question["token"], "groups": groups})
        time.sleep(0.2)
    return len(asked)


def test_it_goes_on_from_a_training_loop_with_the_same_settings(comfy: ComfyServer) -> None:
    loop: Graph = json.loads((REPO / "workflows" / "api" / "quickstart.json").read_text("utf-8"))
    kinds = {node["class_type"]: key for key, node in loop.items()}
    del loop[kinds["DGPO_BeforeAfter"]], loop[kinds["DGPO_TrainingLoop"]]["inputs"]["held_out"]
    loop[kinds["DGPO_TrainingLoop"]]["inputs"]["iterations"] = 1
    loop[kinds["DGPO_LoadPolicy"]]["inputs"]["run"] = "one_engine"
    comfy.run(loop)
    (first,) = line(comfy, "one_engine")
    entry = comfy.run(teach("one_engine"))
    states = line(comfy, "one_engine")
    assert states[0] == first
    assert len(states) >= 2
    assert said(entry).startswith(f"{len(states)} rounds done, {len(states) - 1} of them now.")


def test_the_minutes_are_those_of_all_presses(comfy: ComfyServer) -> None:
    comfy.run(teach("minutes"))
    before, made = files(comfy, "minutes"), len(line(comfy, "minutes"))
    entry = comfy.run(teach("minutes", mode="thumbs"))  # of no use to a reward: the same training
    assert said(entry).startswith(f"Reused from before: {made} round")
    assert files(comfy, "minutes") == before
    comfy.run(teach("minutes", minutes=2 * MOMENT))
    assert len(line(comfy, "minutes")) > made


def test_finish_now_keeps_what_was_learned_and_the_next_run_goes_on(comfy: ComfyServer) -> None:
    assert comfy.post("/dgpo/finish", {"node": "1"}) == {"finishing": False}
    graph = teach("finish", minutes=60)
    prompt = comfy.queue(graph)
    while not comfy.post("/dgpo/finish", {"node": "1"})["finishing"] or not comfy.events.of("progress"):
        time.sleep(0.1)
    entry = comfy.wait(prompt)
    assert said(entry).startswith("Finished at ")
    assert lora(comfy, entry, "2")
    prompt = comfy.queue(graph)  # the same: but it was not done
    end = time.monotonic() + 120
    while not comfy.post("/dgpo/finish", {"node": "1"})["finishing"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    comfy.wait(prompt)


def test_finish_now_reaches_a_node_two_subgraphs_deep(comfy: ComfyServer) -> None:
    """The button knows the node's id in the innermost one."""
    inside = json.loads(json.dumps(teach("deep", minutes=60)).replace('["1", ', '["12:5:1", '))
    prompt = comfy.queue({"12:5:1": inside.pop("1"), **inside})
    end = time.monotonic() + 120
    while not comfy.post("/dgpo/finish", {"node": "1"})["finishing"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    (told,) = (out["text"][0] for id_, out in comfy.wait(prompt)["outputs"].items() if id_ == "12:5:1")
    assert told.startswith("Finished at ")


def test_finish_now_while_a_person_is_asked_closes_the_question_as_finished(comfy: ComfyServer) -> None:
    prompt = comfy.queue(teach("finish_asked", minutes=60, judge="I choose"))
    while not (asked := comfy.get("/dgpo/questions")["questions"]):
        time.sleep(0.1)
    assert comfy.post("/dgpo/finish", {"node": "1"}) == {"finishing": True}
    assert said(comfy.wait(prompt)).startswith("Finished at 0, as you asked")
    ends = {closed["token"]: closed["outcome"] for closed in comfy.events.of("dgpo.question_closed")}
    assert ends[asked[0]["token"]] == "finished"


@pytest.mark.usefixtures("_comfyui")
def test_who_does_not_answer_in_time_is_asked_again_by_the_next_run() -> None:
    with ComfyServer({"dgpo": REPO, "impatient": REPO / "tests" / "comfy" / "packs" / "impatient"}) as server:
        server.run({"1": {"class_type": "TestImpatient", "inputs": {}}})
        graph = teach("late", judge="I choose")
        with pytest.raises(ExecutionFailed, match="Nobody answered in time, and nothing was learned yet"):
            server.run(graph)
        graph["1"]["inputs"]["minutes"] = 7 * MOMENT
        prompt = server.queue(graph)
        (question,) = wait_for_question(server)
        groups = [{"ranking": [[0]]} for _ in question["groups"]]
        server.post(f"/dgpo/questions/{question['token']}", {"groups": groups})
        ended = said(server.wait(prompt))
        assert ended.startswith("Nobody answered in time, so it ended at 1: Run asks again.\n1 round done.")
        prompt = server.queue(graph)  # the same, but it was not done
        assert wait_for_question(server)
        server.interrupt()
        server.wait(prompt, allow_failure=True)


def wait_for_question(server: ComfyServer) -> list[dict[str, Any]]:
    end = time.monotonic() + 120
    while not (asked := server.get("/dgpo/questions")["questions"]):
        assert time.monotonic() < end, server.log()[-2000:]
        time.sleep(0.1)
    return asked


def test_a_person_teaches_and_is_not_asked_twice(comfy: ComfyServer) -> None:
    graph = teach("person", minutes=3 * MOMENT, judge="I choose")
    prompt = comfy.queue(graph)
    assert answer_all(comfy, prompt) == len(line(comfy, "person")) >= 1
    made = line(comfy, "person")
    told = re.search(
        r"(\d+) groups ranked(, the newest pictures win \d+ % against the first)?\.", said(comfy.wait(prompt))
    )
    assert told is not None
    assert int(told[1]) == 4 * len(made)
    assert bool(told[2]) == (len(made) > 1)
    for path in (comfy.base / "output" / "dgpo" / "person").glob("*/state_*"):
        path.unlink()  # the answers are still there
    comfy.restart()  # nothing is in memory, either
    answer_all(comfy, comfy.queue(graph))
    assert line(comfy, "person")[: len(made)] == made


def test_cancel_while_a_person_is_asked_leaves_a_run_that_goes_on(comfy: ComfyServer) -> None:
    graph = teach("person_cancels", judge="I choose")
    prompt = comfy.queue(graph)
    while not comfy.get("/dgpo/questions")["questions"]:
        time.sleep(0.1)
    comfy.interrupt()
    comfy.wait(prompt, allow_failure=True)
    assert answer_all(comfy, comfy.queue(graph)) >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("native_sd15", "sd15"), ("native_sdxl", "sdxl"), ("native_zimage", "zimage"), ("native_wan", "wan"),
        ("native_flux2_klein", "flux2-klein-pickscore"),
    ],
)  # fmt: skip
def test_a_model_of_the_graph_is_taught(small_comfy: ComfyServer, name: str, preset: str) -> None:
    """Small and random ones, with the settings of their family; the LoRA is of that model."""
    graph: Graph = json.loads((REPO / "workflows" / "api" / f"{name}.json").read_text("utf-8"))
    kinds = {node["class_type"]: key for key, node in graph.items()}
    policy = graph[kinds["DGPO_NativePolicy"]]
    policy["inputs"] |= {"rank": 4, "alpha": 8.0, "run": "taught"}
    loaders: Graph = {}
    _take_along(policy, graph, loaders)
    told = {"source": "the text below", "text": "a red fox\na blue bird", "judge": "brightness", "size": 64}
    unused = {"model": "checkpoints/gone.safetensors", "run": "CON"}  # a policy takes their place: nobody looks at them
    taught = {**teach("not_used", **told), **loaders, "policy": policy}
    taught["1"]["inputs"] |= unused
    taught["1"]["inputs"]["policy"] = ["policy", 0]
    entry = small_comfy.run(taught)
    assert re.match(r"\d+ rounds? done\.", said(entry))
    assert "taught" in os.listdir(small_comfy.base / "output" / "dgpo")
    content = lora(small_comfy, entry, "2")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    made, wanted = json.loads(header["dgpo.config"])["rollout"], load_preset(preset).rollout
    assert (made["solver"], made["steps"], made["cfg"]) == (wanted.solver, wanted.steps, wanted.cfg)


def _take_along(node: dict[str, Any], graph: Graph, found: Graph) -> None:
    """What a node is linked to, and what that is, goes from the graph to `found`, under names of its own."""
    for input_, value in node["inputs"].items():
        if isinstance(value, list):
            key, output = value
            node["inputs"][input_] = [f"m{key}", output]
            if f"m{key}" not in found:
                found[f"m{key}"] = graph[key]
                _take_along(graph[key], graph, found)
