"""Any process of several that fails ends all of them within seconds: one checkpoint, one sentence, no traceback."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from engine import write_quick
from processes import train_together

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9"),
]

SOON = 90.0  # seconds for everything, most of it for starting on a busy machine; without word they would wait for ever
CHANGES: dict[str, Any] = {
    "iterations": 1000,
    "data": {"groups_per_iteration": 3},
    "training": {"timesteps": 1},
    "evaluation": {"every": 0, "final_images": 0},
    "checkpoint": {"every": 1000},
}
FAILING = """
import os, signal, sys
from bright import Bright

class Failing(Bright):
    scored = 0

    def score(self, images, prompts, metadata):
        self.scored += 1
        if self.scored > {calls} and os.environ["RANK"] == "{rank}":
            {what}
        return super().score(images, prompts, metadata)
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def failing(folder: Path, model: Path, rank: int, what: str, calls: int = 2, **changes: Any) -> list[str]:
    """The arguments of a training whose reward does something to one process, in the third iteration."""
    argv = write_quick(folder, model, **{**CHANGES, **changes}, reward="failing.py:Failing")
    (folder / "failing.py").write_text(FAILING.format(rank=rank, what=what, calls=calls))
    return [*argv, "--trust-code"]


def together(folder: Path, argv: list[str], size: int, fault: str = "") -> tuple[list[int], list[str]]:
    """Exit codes, and what each process told the user: nothing but sentences."""
    start = time.monotonic()
    codes = train_together(folder, argv, size, fault)
    assert time.monotonic() - start < SOON
    outputs = [(folder / f"output-{rank}.txt").read_text() for rank in range(size)]
    for text in outputs:
        assert "Traceback" not in text
        assert "gloo" not in text
    return codes, [line for text in outputs for line in text.splitlines() if "error" in line.lower()]


def checkpoints(folder: Path) -> list[str]:
    return [path.stem for path in (folder / "runs/test/checkpoints").glob("step_*")]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_reward_that_fails_on_one_process_stops_all(rank: int, sd3_folder: Path, tmp_path: Path) -> None:
    argv = failing(tmp_path, sd3_folder, rank, 'raise ValueError("no more")')
    codes, told = together(tmp_path, argv, 2)
    assert codes == [2, 2]
    (sentence,) = told
    where = "error: In process 1 of 2: Reward" if rank else "error: Reward"
    assert sentence.startswith(f"{where} 'failing.py:Failing' failed on sample 0")
    assert sentence.endswith("with ValueError: no more.")
    assert len(checkpoints(tmp_path)) == 1


def test_a_process_that_is_killed_ends_the_others_with_a_checkpoint(sd3_folder: Path, tmp_path: Path) -> None:
    codes, told = together(tmp_path, failing(tmp_path, sd3_folder, 1, KILL), 3)
    assert codes == [2, -signal.SIGKILL, 2]
    assert told == ["error: Process 1 of 3 is gone: it was killed, or the machine had no memory left."]
    assert checkpoints(tmp_path) == ["step_000002"]


def test_where_the_first_process_is_killed_the_second_tells(sd3_folder: Path, tmp_path: Path) -> None:
    codes, told = together(tmp_path, failing(tmp_path, sd3_folder, 0, KILL), 3)
    assert codes == [-signal.SIGKILL, 2, 2]
    assert told == ["error: Process 0 of 3 is gone: it was killed, or the machine had no memory left."]
    assert told[0] in (tmp_path / "output-1.txt").read_text()


def test_a_process_that_starts_late_does_not_take_the_folder_for_another_runs(sd3_folder: Path, tmp_path: Path) -> None:
    argv = write_quick(tmp_path, sd3_folder, **{**CHANGES, "iterations": 1})
    codes = train_together(tmp_path, argv, 2, "look_late")
    assert codes == [0, 0], (tmp_path / "output-0.txt").read_text()


def test_a_process_in_the_middle_of_drawing_hears_of_it_too(sd3_folder: Path, tmp_path: Path) -> None:
    """Drawing would take the first process ten minutes."""
    drawing = {"steps": 1000, "group_size": 2}
    argv = failing(tmp_path, sd3_folder, 1, KILL, calls=0, rollout=drawing, evaluation={"every": 0, "final_images": 0})
    codes, told = together(tmp_path, argv, 2, "crawl_at_the_front")
    assert codes == [2, -signal.SIGKILL]
    assert len(told) == 1
    assert "Process 1 of 2 is gone" in told[0]


def test_a_process_without_memory_ends_all(sd3_folder: Path, tmp_path: Path) -> None:
    argv = write_quick(tmp_path, sd3_folder, **CHANGES)
    codes, told = together(tmp_path, argv, 2, "run_out_of_memory_in_the_second_update")
    assert codes == [2, 2]
    (sentence,) = told
    assert sentence.startswith("error: In process 1 of 2: The accelerator's memory is too small for one sample")
    assert checkpoints(tmp_path) == ["step_000001"]


def test_a_bug_in_one_process_is_shown_there_and_told_by_the_first(sd3_folder: Path, tmp_path: Path) -> None:
    argv = write_quick(tmp_path, sd3_folder, **CHANGES)
    codes = train_together(tmp_path, argv, 2, "break_the_last_process")
    assert codes == [2, 1]
    told, trace = ((tmp_path / f"output-{rank}.txt").read_text() for rank in range(2))
    assert "error: In process 1 of 2: ZeroDivisionError: a bug" in told
    assert "Traceback" not in told
    assert "ZeroDivisionError: a bug" in trace


def test_weights_that_draw_nothing_on_another_process_are_kept_by_none(sd3_folder: Path, tmp_path: Path) -> None:
    what = 'from dgpo_core.common.errors import Diverged; raise Diverged("no picture.")'
    codes, told = together(tmp_path, failing(tmp_path, sd3_folder, 1, what), 2)
    assert codes == [2, 2]
    assert told == ["error: In process 1 of 2: no picture."]
    assert checkpoints(tmp_path) == []
