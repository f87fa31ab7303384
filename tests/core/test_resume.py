"""A run that is killed or interrupted, at any moment, ends as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from engine import write_quick
from processes import finish, start, train_in, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9"),
]

ITERATIONS = 6
CHANGES: dict[str, Any] = {
    "iterations": ITERATIONS,
    "training": {"timesteps": 1, "ema_slow_every": 2},
    "rollout": {"on_policy_steps": 3},
    "evaluation": {"every": 3, "images": 2, "final_images": 2},
}


def lines(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, all of them whole."""
    return [json.loads(line) for line in (folder / "runs/test/metrics.jsonl").read_text().splitlines()]


def iterations(folder: Path) -> int:
    """How many iterations metrics.jsonl tells of, while it is being written."""
    path = folder / "runs/test/metrics.jsonl"
    return path.read_text().count('"reward_std"') if path.exists() else 0


def result(folder: Path) -> bytes:
    return (folder / "runs/test/lora.safetensors").read_bytes()


def told(folder: Path) -> str:
    return (folder / "output-0.txt").read_text()


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in lines(folder)]


@pytest.fixture(scope="module")
def whole(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_in(folder, write_quick(folder, sd3_folder, **CHANGES)) == 0, told(folder)
    return folder


def test_metrics_tell_of_every_iteration_and_measurement_once(whole: Path) -> None:
    records = lines(whole)
    assert [r["iteration"] for r in records if "reward" in r] == list(range(1, ITERATIONS + 1))
    assert [r["iteration"] for r in records if "held_out" in r] == [0, 3, ITERATIONS]


def test_a_run_that_is_killed_again_and_again_ends_bit_identical(whole: Path, sd3_folder: Path, tmp_path: Path) -> None:
    """Twice at a random moment, once amid the bytes of a checkpoint, once before it has its name."""
    rng = random.Random(os.urandom(8))
    argv = write_quick(tmp_path, sd3_folder, **CHANGES)
    assert train_in(tmp_path, argv, "die_while_writing_step_2") == -signal.SIGKILL, told(tmp_path)
    assert train_in(tmp_path, [*argv, "--resume"], "die_before_naming_step_4") == -signal.SIGKILL, told(tmp_path)
    for _ in range(2):
        process = start(tmp_path, [*argv, "--resume"])
        done, wanted = iterations(tmp_path), rng.randint(0, 1)
        wait_for(lambda done=done, wanted=wanted: iterations(tmp_path) >= min(done + wanted, ITERATIONS), process)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        assert finish(process) in (0, -signal.SIGKILL), told(tmp_path)
    assert train_in(tmp_path, [*argv, "--resume"]) == 0, told(tmp_path)
    assert result(tmp_path) == result(whole)
    assert without_seconds(tmp_path) == without_seconds(whole)
    assert not list((tmp_path / "runs").rglob("*.tmp*"))
    summary, expected = (json.loads((f / "runs/test/summary.json").read_text()) for f in (tmp_path, whole))
    assert {**summary, "seconds": 0} == {**expected, "seconds": 0}


def test_ctrl_c_ends_with_a_checkpoint_and_exit_code_130(whole: Path, sd3_folder: Path, tmp_path: Path) -> None:
    argv = write_quick(tmp_path, sd3_folder, **{**CHANGES, "checkpoint": {"every": 100}})
    process = start(tmp_path, argv)
    wait_for(lambda: iterations(tmp_path) >= 2, process)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130, told(tmp_path)
    (checkpoint,) = (tmp_path / "runs/test/checkpoints").glob("step_*")
    step = int(checkpoint.stem.removeprefix("step_"))
    assert 2 <= step < ITERATIONS
    assert f"Stopped after iteration {step} of {ITERATIONS}; --resume goes on from there." in told(tmp_path)
    assert "Traceback" not in told(tmp_path)
    assert train_in(tmp_path, [*argv, "--resume"]) == 0, told(tmp_path)
    assert without_seconds(tmp_path) == without_seconds(whole)


def test_a_run_ends_when_its_minutes_are_over_and_goes_on_with_more(
    whole: Path, sd3_folder: Path, tmp_path: Path
) -> None:
    argv = write_quick(tmp_path, sd3_folder, **CHANGES)
    assert train_in(tmp_path, [*argv, "--minutes", "0.0001"]) == 0, told(tmp_path)
    assert iterations(tmp_path) == 1
    assert (tmp_path / "runs/test/lora.safetensors").exists()
    assert train_in(tmp_path, [*argv, "--minutes", "0.0001", "--resume"]) == 0, told(tmp_path)
    assert iterations(tmp_path) == 1
    assert train_in(tmp_path, [*argv, "--resume"]) == 0, told(tmp_path)
    assert result(tmp_path) == result(whole)


def test_prompts_that_have_changed_are_told(whole: Path, tmp_path: Path) -> None:
    folder, warning = tmp_path / "copy", "Warning: the training prompts are not those that the run began with"
    shutil.copytree(whole, folder)
    assert train_in(folder, ["--config", "quick.yaml", "--resume"]) == 0, told(folder)
    assert warning not in told(folder)
    (folder / "prompts.txt").write_text("red\nblue\n")
    assert train_in(folder, ["--config", "quick.yaml", "--resume", "--iterations", "7"]) == 0, told(folder)
    assert warning in told(folder)


def test_a_finished_run_may_be_resumed_and_is_the_same(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    assert train_in(folder, ["--config", "quick.yaml", "--resume"]) == 0, told(folder)
    assert result(folder) == result(whole)
    assert without_seconds(folder) == without_seconds(whole)
    # and further: the whole way in one go is another run only in its name
    assert train_in(folder, ["--config", "quick.yaml", "--resume", "--iterations", "7"]) == 0, told(folder)
    assert lines(folder)[-2]["iteration"] == 7
    assert result(folder) != result(whole)
