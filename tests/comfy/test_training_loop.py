"""The Training Loop in a real ComfyUI: it goes on from where it was, can be cancelled, and shows how far it is."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from comfy_graphs import DRAW, TRAIN, loop, visual
from comfy_results import cancel, equal, error_of, files, headless, line, lora, steps_done, tensors, wait_for_step
from comfy_server import ComfyServer, Events, ExecutionFailed
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.rewards import Reward
from dgpo_core.rewards.serve import RewardServer

TEXT = 3  # the kind of a binary message that is a line of progress


def test_a_larger_number_goes_on_from_where_the_loop_was(comfy: ComfyServer, tmp_path: Path) -> None:
    comfy.run(loop("longer", 2))
    before = files(comfy, "longer")
    prompt = comfy.queue(loop("longer", 4))
    entry = comfy.wait(prompt)
    assert min(steps_done(comfy, prompt)) == 2
    assert before.items() - files(comfy, "longer").items() == {("run.json", before["run.json"])}
    assert equal(tensors(lora(comfy, entry)), headless(loop("longer", 4), 4, tmp_path))


def test_the_visual_loop_goes_on_from_the_loop(comfy: ComfyServer, tmp_path: Path) -> None:
    comfy.run(loop("handed_over", 2))
    entry = comfy.run(visual("handed_over", 2))
    assert equal(tensors(lora(comfy, entry)), headless(visual("handed_over"), 3, tmp_path))


def test_cancel_ends_the_loop_and_keeps_the_last_iteration(comfy: ComfyServer, tmp_path: Path) -> None:
    prompt = comfy.queue(loop("cancelled", 1000))
    wait_for_step(comfy, prompt, 2)
    start = time.monotonic()
    comfy.interrupt()
    with pytest.raises(ExecutionFailed) as ending:
        comfy.wait(prompt)
    assert ending.value.kind == "interrupted"
    assert time.monotonic() - start < 10
    made = max(steps_done(comfy, prompt))
    assert len(line(comfy, "cancelled")) in (made, made + 1)  # the next was done, but not shown yet
    assert not [name for name in files(comfy, "cancelled") if "tmp" in name]

    small = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}
    comfy.run({"1": small, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}, timeout=60)

    end = len(line(comfy, "cancelled")) + 1
    prompt = comfy.queue(loop("cancelled", end))
    entry = comfy.wait(prompt)
    assert min(steps_done(comfy, prompt)) == end - 1
    assert equal(tensors(lora(comfy, entry)), headless(loop("cancelled", end), end, tmp_path))


def test_cancel_of_a_single_step_leaves_no_trace(comfy: ComfyServer) -> None:
    made = [lora(comfy, comfy.run(visual("stopped", i))) for i in (0, 1)]
    before = files(comfy, "stopped")
    big = {
        "Prompts": {"per_iteration": 8},
        "SamplerSettings": {"group_size": 64},
        "TrainingSettings": {"micro_batch": 1},
    }
    for seen in (DRAW, TRAIN):  # while it draws, and while it trains
        few = big if seen == TRAIN else {**big, "SamplerSettings": {"group_size": 64, "steps": 200}}
        cancel(comfy, visual("stopped", 1, **few), seen, within=20)
    assert files(comfy, "stopped") == before
    assert lora(comfy, comfy.run(visual("stopped", 1))) == made[1]


def test_progress_previews_and_time_left_arrive(comfy: ComfyServer) -> None:
    class Texts(Events):
        texts: tuple[str, ...] = ()

        def _take(self, data: str | bytes) -> None:
            super()._take(data)
            if isinstance(data, bytes) and int.from_bytes(data[:4], "big") == TEXT:
                size = int.from_bytes(data[4:8], "big")
                self.texts += ((data[8 + size :]).decode(),)

    events = Texts(comfy.url, "a-page")
    prompt = comfy.queue(loop("watched", 3, LoadPolicy={"run_seed": 7}), client_id="a-page")
    comfy.wait(prompt)
    shown = [p for p in events.of("progress") if p["node"] == TRAIN]
    assert [p["value"] for p in shown] == sorted(p["value"] for p in shown)
    assert (shown[-1]["value"], shown[-1]["max"]) == (3, 3)
    assert events.previews >= 2  # the first iteration and the last
    assert len(events.texts) == 3
    assert re.fullmatch(r"iteration 1 of 3 · reward \d\.\d{3} · \d+:\d\d left", events.texts[0])
    assert re.fullmatch(r"iteration 3 of 3 · reward \d\.\d{3} · 0:00 left", events.texts[-1])
    assert f"{events.texts[-1]} |" in comfy.log()


def test_texts_of_progress_go_to_the_page_that_asked(comfy: ComfyServer) -> None:
    class Texts(Events):
        texts = 0

        def _take(self, data: str | bytes) -> None:
            super()._take(data)
            self.texts += isinstance(data, bytes) and int.from_bytes(data[:4], "big") == TEXT

    mine, others = Texts(comfy.url, "mine"), Texts(comfy.url, "another")
    comfy.wait(comfy.queue(loop("owned", 2), client_id="mine"))
    assert mine.texts == 2
    assert others.texts == 0


class FailsThird(Reward):
    """A reward that fails at its third call."""

    calls = 0

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise UserError("I am tired.")
        return images.mean((1, 2, 3))


def test_an_error_in_the_middle_of_a_loop_keeps_what_was_finished(comfy: ComfyServer) -> None:
    with RewardServer("tired", FailsThird(), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        file = comfy.base / "user/__dgpo/endpoints.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"tired: {{url: '{server.url}'}}\n")
        graph = loop("tired", 4, Reward={"name": "remote", "options": '{"endpoint": "tired"}'})
        assert "I am tired" in error_of(comfy, graph).message
        assert len(line(comfy, "tired")) == 2
        prompt = comfy.queue(graph)
        comfy.wait(prompt)
        assert min(steps_done(comfy, prompt)) == 2
        server.shutdown()
