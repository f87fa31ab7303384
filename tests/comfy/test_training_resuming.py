"""Runs in a ComfyUI that remembers earlier outputs: other settings under one name, and after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_graphs import loop, visual
from comfy_results import equal, error_of, files, headless, line, lora, steps_done, tensors, wait_for_step
from comfy_server import ComfyServer


@pytest.fixture(scope="module")
def lru(_comfyui: None) -> Iterator[ComfyServer]:
    """A server that remembers the outputs of earlier prompts, as 0.33 always does; tests may restart it."""
    with ComfyServer(arguments=["--cache-lru", "200"]) as server:
        yield server


# --- other settings under the same name ------------------------------------------------------------------------------


def test_two_settings_under_one_name_do_not_disturb_each_other(lru: ComfyServer) -> None:
    """Each goes by its own states, whatever ComfyUI remembers of the other's."""

    def run(name: str, rate: float) -> list[bytes]:
        graphs = [visual(name, i, TrainingSettings={"lr": rate}) for i in range(3)]
        return [lora(lru, lru.run(graph)) for graph in graphs]

    slow, fast = run("shared", 0.01), run("shared", 0.02)
    assert not equal(tensors(slow[0]), tensors(fast[0]))
    assert run("shared", 0.01) == slow
    lru.run(visual("shared", 3, TrainingSettings={"lr": 0.01}))
    alone = run("fast_alone", 0.02)
    assert [equal(tensors(a), tensors(b)) for a, b in zip(alone, fast, strict=True)] == [True] * 3


def test_going_back_within_a_run_does_not_cut_it_off(lru: ComfyServer) -> None:
    for iteration in (0, 1, 2, 0, 1, 2, 3):
        lru.run(visual("back", iteration))
    assert len(line(lru, "back")) == 4
    lru.run(visual("back", 1, RewardScorer={}))
    lru.run(visual("back", 4))
    assert len(line(lru, "back")) == 5


def test_a_loop_after_a_loop_of_other_settings_goes_on(lru: ComfyServer) -> None:
    first = lru.run(loop("loops", 2))
    lru.run(loop("loops", 2, TrainingSettings={"lr": 0.02}))
    prompt = lru.queue(loop("loops", 3))
    lru.wait(prompt)
    assert min(steps_done(lru, prompt)) == 2
    assert lora(lru, lru.run(loop("loops", 2))) == lora(lru, first)


def test_a_run_whose_folder_is_deleted_starts_anew(lru: ComfyServer) -> None:
    made = [lora(lru, lru.run(visual("deleted", i))) for i in range(2)]
    folder = lru.base / "output" / "dgpo" / "deleted"
    folder.rename(lru.base / "gone")
    assert "has made 0 iterations" in error_of(lru, visual("deleted", 2)).message
    assert [lora(lru, lru.run(visual("deleted", i))) for i in range(2)] == made
    assert len(line(lru, "deleted")) == 2


# --- restarts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(lru: ComfyServer) -> dict[str, Any]:
    """What was there when the server was killed in the middle of a loop, and it is running anew."""
    queued = [lora(lru, lru.run(visual("restarted", i))) for i in (0, 1)]
    prompt = lru.queue(loop("killed", 1000, save_every=1))
    wait_for_step(lru, prompt, 4)  # it is shown before it is written: three are sure
    lru.restart(kill=True)
    return {"queued": queued, "files": files(lru, "restarted"), "killed": len(line(lru, "killed"))}


def test_the_same_queue_after_a_restart_trains_nothing(lru: ComfyServer, cut: dict[str, Any]) -> None:
    assert [lora(lru, lru.run(visual("restarted", i))) for i in (0, 1)] == cut["queued"]
    assert files(lru, "restarted") == cut["files"]


def test_queued_iterations_go_on_after_a_restart(lru: ComfyServer, cut: dict[str, Any], tmp_path: Path) -> None:
    entry = lru.run(visual("restarted", 2))
    assert equal(tensors(lora(lru, entry)), headless(visual("restarted"), 3, tmp_path))


def test_a_loop_resumes_after_a_kill(lru: ComfyServer, cut: dict[str, Any], tmp_path: Path) -> None:
    end = cut["killed"] + 2
    prompt = lru.queue(loop("killed", end, save_every=1))
    entry = lru.wait(prompt)
    assert min(steps_done(lru, prompt)) >= cut["killed"] >= 3
    assert equal(tensors(lora(lru, entry)), headless(loop("killed", end), end, tmp_path))


def test_minus_one_goes_on_from_where_the_run_is_also_in_a_batch_that_was_cancelled(comfy: ComfyServer) -> None:
    graph = visual("going_on", -1)
    comfy.run(graph)
    prompts = [comfy.queue(graph) for _ in range(3)]  # the same graph, as the batch count queues it
    comfy.interrupt()
    entries = [comfy.wait(prompt, allow_failure=True) for prompt in prompts]
    kinds = [kind for entry in entries for kind, _ in entry["status"]["messages"]]
    assert "execution_error" not in kinds
    made = len(line(comfy, "going_on"))
    assert made >= 3  # the cancelled one at most is missing
    comfy.run(graph)
    assert len(line(comfy, "going_on")) == made + 1
