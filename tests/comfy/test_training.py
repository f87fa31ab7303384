"""Training in a real ComfyUI: a state is what its settings make of it, however and how often it is asked for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import REPO, ComfyServer, Events, ExecutionFailed, PromptRefused, images
from PIL import Image
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

from dgpo_core.comfy.workflow import load_workflow
from dgpo_core.common.distributed import World
from dgpo_core.common.errors import UserError
from dgpo_core.method.trainer import Trainer
from dgpo_core.rewards import Reward
from dgpo_core.rewards.serve import RewardServer
from dgpo_core.runs import assemble
from dgpo_core.settings.values import from_dict

Graph = dict[str, dict[str, Any]]
QUICK = {
    "DGPO_LoadPolicy": {"rank": 4, "alpha": 8.0},
    "DGPO_Prompts": {"per_iteration": 1},
    "DGPO_SamplerSettings": {"group_size": 8},
    "DGPO_TrainingSettings": {"lr": 0.01},
}
POLICY, PROMPTS, SAMPLER, DRAW, REWARD, SCORE, SETTINGS, TRAIN, SAVE = "123456789"
TEXT = 3  # the kind of a binary message that is a line of progress


@pytest.fixture(scope="module")
def lru(_comfyui: None) -> Iterator[ComfyServer]:
    """A server that remembers the outputs of earlier prompts, as 0.33 always does; tests may restart it."""
    with ComfyServer(arguments=["--cache-lru", "200"]) as server:
        yield server


# --- graphs ----------------------------------------------------------------------------------------------------------


def workflow(name: str, **inputs: Mapping[str, Any]) -> Graph:
    """One of the workflows, made small; `inputs` are by kind of node, without its prefix."""
    graph: Graph = json.loads((REPO / "workflows" / "api" / f"{name}.json").read_text("utf-8"))
    changes = [*QUICK.items(), *((f"DGPO_{kind}", values) for kind, values in inputs.items())]
    for kind, values in changes:
        for node in graph.values():
            if node["class_type"] == kind:
                node["inputs"].update(values)
    return graph


def visual(run: str, iteration: int = 0, **inputs: Mapping[str, Any]) -> Graph:
    """Draw, score, train and save, one iteration."""
    graph = workflow("visual_loop", **inputs)
    graph[POLICY]["inputs"]["run"] = run
    graph[DRAW]["inputs"]["iteration"] = iteration
    return graph


def loop(run: str, iterations: int, save_every: int = 10, **inputs: Mapping[str, Any]) -> Graph:
    """The Training Loop with the settings of `visual`, and the node that saves."""
    graph = visual(run, **inputs)
    told = {"sampler": SAMPLER, "prompts": PROMPTS, "reward": REWARD, "settings": SETTINGS, "policy": POLICY}
    links = {name: [node, 0] for name, node in told.items()}
    options = {"iterations": iterations, "save_every": save_every, "weights": graph[TRAIN]["inputs"]["weights"]}
    graph[TRAIN] = {"class_type": "DGPO_TrainingLoop", "inputs": {**links, **options}}
    return {key: node for key, node in graph.items() if key not in (DRAW, SCORE)}


def chain(graph: Graph, start: str, policy: str, trained: str = "") -> Graph:
    """The nodes of one more step behind `trained` (else from the policy's node), as `start` + their ids."""
    copies = {key: json.loads(json.dumps(graph[key])) for key in (DRAW, SCORE, TRAIN, SAVE)}
    source = [trained or policy, 0]
    copies[DRAW]["inputs"] |= {"policy": source, "iteration": 1 if trained else 0}
    copies[SCORE]["inputs"]["groups"] = [start + DRAW, 0]
    copies[TRAIN]["inputs"] |= {"policy": source, "scored": [start + SCORE, 0]}
    copies[SAVE]["inputs"]["lora"] = [start + TRAIN, 1]
    return {start + key: node for key, node in copies.items()}


# --- what came of it -------------------------------------------------------------------------------------------------


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
    config = from_dict(load_workflow(path))
    world = World("cpu")
    policy, size = assemble.load_model(config, world)
    rewards = assemble.training_rewards(config, world)
    trainer = Trainer(policy, assemble.training_prompts(config), rewards, config, size=size, world=world)
    for _ in range(iterations):
        trainer.iterate()
    return policy.lora_tensors(config.evaluation.weights)


def steps_done(server: ComfyServer, prompt_id: str) -> list[int]:
    """The iterations that the loop's bar has shown."""
    shown = server.events.of("progress")
    return [p["value"] for p in shown if p.get("prompt_id") == prompt_id and p.get("node") == TRAIN]


def wait_for_step(server: ComfyServer, prompt_id: str, step: int) -> None:
    end = time.monotonic() + 120
    while not any(value >= step for value in steps_done(server, prompt_id)):
        assert time.monotonic() < end, server.log()[-2000:]
        time.sleep(0.05)


# --- a state is what made it -----------------------------------------------------------------------------------------


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


# --- loops -----------------------------------------------------------------------------------------------------------


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
    for seen in ("4", TRAIN):  # while it draws, and while it trains
        done = len(comfy.events.messages)
        few = big if seen == TRAIN else {**big, "SamplerSettings": {"group_size": 64, "steps": 200}}
        prompt = comfy.queue(visual("stopped", 1, **few))
        end = time.monotonic() + 120
        while not any(_progress_of(message) == (prompt, seen) for message in comfy.events.messages[done:]):
            assert time.monotonic() < end
            time.sleep(0.05)
        comfy.interrupt()
        with pytest.raises(ExecutionFailed, match="interrupted"):
            comfy.wait(prompt, 20)
    assert files(comfy, "stopped") == before
    assert lora(comfy, comfy.run(visual("stopped", 1))) == made[1]


def _progress_of(message: Mapping[str, Any]) -> tuple[str, str] | None:
    data = message.get("data") or {}
    return (data.get("prompt_id"), data.get("node")) if message["type"] == "progress" else None


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


# --- what goes wrong -------------------------------------------------------------------------------------------------


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
    assert "'no facts' has none" in error_of(comfy, graph).message
    assert files(comfy, "bad_prompt") == {}


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


def test_a_preset_that_does_not_exist_is_told(comfy: ComfyServer) -> None:
    """0.3.64 takes any text for a choice, later ones look into the list."""
    with pytest.raises(
        (ExecutionFailed, PromptRefused), match="There is no preset none such: choose|none such.*not in"
    ):
        comfy.run(visual("no_preset", TrainingSettings={"preset": "none such"}))


def test_groups_without_scores_are_refused_plainly(comfy: ComfyServer) -> None:
    error = error_of(comfy, visual("unscored", LoRATrainer={"scored": [DRAW, 0]}))
    assert error.node_type == "DGPO_LoRATrainer"
    assert error.message.startswith("These groups have no scores: put a Reward Scorer")


def test_groups_of_another_policy_are_refused_plainly(comfy: ComfyServer) -> None:
    graph = visual("mixed", LoRATrainer={"policy": ["other", 0]})
    graph["other"] = visual("mixed", LoadPolicy={"run_seed": 3})[POLICY]
    assert error_of(comfy, graph).message.startswith("The groups are of another policy")


# --- scores from elsewhere -------------------------------------------------------------------------------------------


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
