"""One process or many: whole groups stay together, gradients add up, and the adapter that comes out is the same."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import write_quick
from processes import ROOT, finish, free_port, start, train_in, train_together, wait_for
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dgpo_core.common.distributed import World
from dgpo_core.common.errors import UserError

# lr 1e-3 over 3 steps moves each number by some 1e-3. Gradients that are summed in another order differ in their last
# bits, which AdamW turns into as much of a step where a gradient is nearly zero.
CLOSE = 2e-5
CHANGES: dict[str, Any] = {
    "training": {"lr": 1e-3, "advantage_std": "global", "ema_slow_every": 1},
    "evaluation": {"every": 0, "final_images": 5},
}


class Of(World):
    """A process of a world that is not there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.device = rank, size, torch.device("cpu")


@pytest.mark.parametrize(("size", "groups"), [(1, 4), (2, 4), (2, 3), (3, 2), (4, 0)])
def test_every_group_is_on_one_process_and_the_shares_are_even(size: int, groups: int) -> None:
    shares = [Of(rank, size).share(range(groups)) for rank in range(size)]
    assert sorted(g for share in shares for g in share) == list(range(groups))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("device", ["cuda:63", "meta"])
def test_a_device_that_is_not_there_is_one_sentence(device: str) -> None:
    with pytest.raises(UserError, match=f"The device {device} is not there: "):
        World(device)


def test_one_process_needs_no_launcher_and_no_messages() -> None:
    world = World("cpu")
    assert (world.rank, world.size, world.leads) == (0, 1, True)
    assert world.gather([1, 2]) == [1, 2]
    assert (world.any(True), world.any(False)) == (True, False)
    tensor = torch.ones(2)
    world.add_([tensor])
    assert tensor.tolist() == [1, 1]
    world.close()


@pytest.mark.parametrize(
    ("left", "says"),
    [
        (
            {"WORLD_SIZE": "abc"},
            "WORLD_SIZE is 'abc' in the environment and must be a number: unset WORLD_SIZE, or start",
        ),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '' in the environment and must be a number: unset WORLD_SIZE, or start"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x' in the environment"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment but RANK is not set, so no launcher has started"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
            "but MASTER_ADDR is not set, .*: unset WORLD_SIZE, or start",
        ),
    ],
)
def test_what_no_launcher_sets_is_one_sentence(
    left: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        World("cpu")


def test_a_world_size_of_one_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert World("cpu").size == 1


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "runs/test/lora.safetensors")


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/test/summary.json").read_text())


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/test/metrics.jsonl").read_text().splitlines()]


def one_process(folder: Path, model: Path, groups: int) -> Path:
    argv = write_quick(folder, model, **CHANGES, data={"groups_per_iteration": groups})
    assert train_in(folder, argv) == 0, (folder / "output-0.txt").read_text()
    return folder


def same(many: Path, one: Path) -> None:
    """Asserts that both trainings ended alike."""
    found, expected = adapter(many), adapter(one)
    assert set(found) == set(expected)
    assert max((found[key] - expected[key]).abs().max() for key in found) < CLOSE
    assert max(value.abs().max() for key, value in found.items() if "lora_B" in key) > 20 * CLOSE  # they have moved
    for name in ("base", "adapter"):
        assert summary(many)[name]["n"] == summary(one)[name]["n"] == 5
        assert summary(many)[name]["mean"] == pytest.approx(summary(one)[name]["mean"], abs=1e-4)
    for a, b in zip(metrics(many), metrics(one), strict=True):
        assert a["iteration"] == b["iteration"]
        names = {"reward", "reward_std", "loss", "kl", "grad_norm", "informative", "held_out"} & set(b)
        assert {name: a[name] for name in names} == pytest.approx({name: b[name] for name in names}, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("processes", "groups"), [(2, 3), (3, 2)], ids=["odd groups", "more processes than groups"])
def test_many_processes_end_with_the_adapter_of_one(
    processes: int, groups: int, sd3_folder: Path, tmp_path: Path
) -> None:
    one = one_process(tmp_path / "one", sd3_folder, groups)
    many = tmp_path / "many"
    argv = write_quick(many, sd3_folder, **CHANGES, data={"groups_per_iteration": groups})
    codes = train_together(many, argv, processes)
    assert codes == [0] * processes, (many / "output-0.txt").read_text()
    same(many, one)
    for rank in range(1, processes):  # one process talks
        assert "held-out" not in (many / f"output-{rank}.txt").read_text()


@pytest.mark.slow
@pytest.mark.processes
def test_accelerate_launch_ends_with_the_adapter_of_one_process(sd3_folder: Path, tmp_path: Path) -> None:
    one = one_process(tmp_path / "one", sd3_folder, groups=2)
    many = tmp_path / "many"
    argv = write_quick(many, sd3_folder, **CHANGES, data={"groups_per_iteration": 2})
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    # not --cpu: with that, accelerate starts several processes only through mpirun, and else one without a word
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    options += ["--main_process_port", str(free_port())]
    process = subprocess.run(
        [*launch, *options, str(ROOT / "tests" / "helpers" / "bright.py"), *argv],
        cwd=many,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.count("lora.safetensors") == 1
    same(many, one)
    with safe_open(many / "runs/test/lora.safetensors", "pt") as file:
        assert file.metadata()["dgpo.step"] == "3"


@pytest.mark.slow
@pytest.mark.processes
def test_ctrl_c_ends_all_processes_with_one_checkpoint(sd3_folder: Path, tmp_path: Path) -> None:
    """Every process gets the signal, and a launcher passes it on a second time."""
    data = {"groups_per_iteration": 2}
    argv = write_quick(tmp_path, sd3_folder, **CHANGES, data=data, iterations=1000, checkpoint={"every": 1000})
    port = free_port()
    processes = [start(tmp_path, argv, "", rank, 2, port) for rank in range(2)]
    written = tmp_path / "runs/test/metrics.jsonl"
    wait_for(lambda: written.exists() and '"reward"' in written.read_text(), processes[0])
    for _ in range(2):
        for process in processes:
            os.kill(process.pid, signal.SIGINT)
    assert [finish(process) for process in processes] == [130, 130]
    told = [(tmp_path / f"output-{rank}.txt").read_text() for rank in range(2)]
    assert "--resume goes on from there" in told[0]
    assert not any("Traceback" in text for text in told)
    assert len(list((tmp_path / "runs/test/checkpoints").glob("step_*"))) == 1


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_of_two_processes_resumes_as_one(sd3_folder: Path, tmp_path: Path) -> None:
    """The checkpoint knows nothing of the number of processes."""
    data = {"groups_per_iteration": 2}
    one, many = one_process(tmp_path / "one", sd3_folder, groups=2), tmp_path / "many"
    argv = write_quick(many, sd3_folder, **CHANGES, data=data, iterations=2)
    assert train_together(many, argv, 2) == [0, 0], (many / "output-0.txt").read_text()
    assert train_in(many, [*argv, "--resume", "--iterations", "3"]) == 0, (many / "output-0.txt").read_text()
    found, expected = adapter(many), adapter(one)
    assert max((found[key] - expected[key]).abs().max() for key in found) < CLOSE


@pytest.mark.slow
@pytest.mark.processes
def test_a_group_that_one_process_skips_is_skipped_as_by_one(sd3_folder: Path, tmp_path: Path) -> None:
    """Of 3 groups on 2 processes, the one with "blue" cannot be scored: processes are left with 2 and 0, or 1 and 1."""
    changes = {**CHANGES, "reward": "picky.py:Picky", "on_bad_score": "skip", "data": {"groups_per_iteration": 3}}
    codes = {}
    for name, processes in (("one", 1), ("many", 2)):
        argv = [*write_quick(tmp_path / name, sd3_folder, **changes), "--trust-code"]
        (tmp_path / name / "picky.py").write_text(PICKY)
        codes[name] = train_together(tmp_path / name, argv, processes)
    assert codes == {"one": [0], "many": [0, 0]}, (tmp_path / "many" / "output-0.txt").read_text()
    same(tmp_path / "many", tmp_path / "one")
    for name in codes:
        assert [r["skipped"] for r in metrics(tmp_path / name) if "loss" in r] == [1, 1, 1]
        told = (tmp_path / name / "output-0.txt").read_text()
        assert "1 group(s) left out: Reward 'picky.py:Picky' failed on sample 0 ('blue') with ValueError" in told


PICKY = """
from bright import Bright

class Picky(Bright):
    def score(self, images, prompts, metadata):
        if "blue" in prompts:
            raise ValueError("not blue")
        return super().score(images, prompts, metadata)
"""
