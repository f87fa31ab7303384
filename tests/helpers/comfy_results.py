"""What came of a training in ComfyUI: its LoRAs, files, errors and progress, and the same by the engine alone."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_graphs import SAVE, TRAIN, Graph
from comfy_server import ComfyServer, ExecutionFailed
from safetensors.torch import load as load_safetensors
from torch import Tensor

from dgpo_core.comfy.workflow import Workflow, training_of
from dgpo_core.common.distributed import World
from dgpo_core.method.trainer import Trainer
from dgpo_core.runs import assemble
from dgpo_core.settings.values import from_dict


def lora(server: ComfyServer, entry: Mapping[str, Any], node: str = SAVE) -> bytes:
    """The file that a Save LoRA node wrote."""
    return (server.base / "output" / "loras" / entry["outputs"][node]["text"][0]).read_bytes()


def tensors(content: bytes) -> dict[str, Tensor]:
    """The weights in the bytes of a LoRA; one that has learned nothing fails the test."""
    found = load_safetensors(content)
    assert any(value.any() for key, value in found.items() if "lora_B" in key)
    return found


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def files(server: ComfyServer, run: str) -> dict[str, tuple[int, str]]:
    """The run's files: inode, which writing one again changes, and hash of the content."""
    found = (path for path in (server.base / "output" / "dgpo" / run).rglob("*") if path.is_file())
    return {path.name: (path.stat().st_ino, hashlib.sha256(path.read_bytes()).hexdigest()) for path in found}


def line(server: ComfyServer, run: str) -> list[str]:
    """The keys of the states that the run goes by."""
    (path,) = (server.base / "output" / "dgpo" / run).glob("*/run.json")
    return json.loads(path.read_text("utf-8"))["states"]


def error_of(server: ComfyServer, graph: Graph) -> ExecutionFailed:
    """The error that a graph ends with, which is one sentence for a person."""
    with pytest.raises(ExecutionFailed) as error:
        server.run(graph)
    assert error.value.kind == "error"
    sentence = error.value.message
    assert sentence.endswith(".")
    assert not re.search(r"[.!?]\s+[A-Z]|\n|Error\b", sentence), sentence
    return error.value


def headless(graph: Graph, iterations: int, folder: Path) -> dict[str, Tensor]:
    """The LoRA after so many iterations of the engine's own trainer with the settings of a graph."""
    path = folder / "graph.json"
    path.write_text(json.dumps(graph), "utf-8")
    config = from_dict(training_of(Workflow(path)))
    world = World("cpu")
    policy, size = assemble.load_model(config, world.device)
    rewards = assemble.training_rewards(config, world.device)
    trainer = Trainer(policy, assemble.training_prompts(config), rewards, config, size=size, world=world)
    for _ in range(iterations):
        trainer.iterate()
    return policy.lora_tensors(config.evaluation.weights)


def steps_done(server: ComfyServer, prompt_id: str) -> list[int]:
    """The iterations that the loop's bar has shown."""
    shown = server.events.of("progress")
    return [p["value"] for p in shown if p.get("prompt_id") == prompt_id and p.get("node") == TRAIN]


def wait_for_step(server: ComfyServer, prompt_id: str, step: int) -> None:
    """Until the loop's bar has shown so many iterations."""
    end = time.monotonic() + 120
    while not any(value >= step for value in steps_done(server, prompt_id)):
        assert time.monotonic() < end, server.log()[-2000:]
        time.sleep(0.05)


def cancel(server: ComfyServer, graph: Graph, node: str, within: float = 60) -> None:
    """Queues a graph and presses Cancel once `node` has made a step; it must end as interrupted in so many seconds."""
    seen = len(server.events.messages)
    prompt, end = server.queue(graph), time.monotonic() + 300
    while not any(_progress_of(message) == (prompt, node) for message in server.events.messages[seen:]):
        assert time.monotonic() < end, server.log()[-2000:]
        time.sleep(0.05)
    server.interrupt()
    with pytest.raises(ExecutionFailed, match="interrupted"):
        server.wait(prompt, within)


def _progress_of(message: Mapping[str, Any]) -> tuple[str, str] | None:
    data = message.get("data") or {}
    return (data.get("prompt_id"), data.get("node")) if message["type"] == "progress" else None
