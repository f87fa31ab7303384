import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import write_atomic
from dgpo_core.runs.run import Run
from dgpo_core.settings.config import Config
from dgpo_core.settings.yaml_file import load_yaml, to_yaml

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX limits and signals")


@contextmanager
def _small_disk(limit: int) -> Iterator[None]:
    """No file may grow over `limit` bytes: a write that the system itself refuses half-way."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _resumed(config: Config, **changes: object) -> Config:
    return replace(config, resume=True, **changes)


# --- whole files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["grün", "grün".encode(), lambda path: path.write_text("grün", encoding="utf-8")])
def test_write_replaces_the_whole_file(tmp_path: Path, content: object) -> None:
    path = tmp_path / "file.txt"
    path.write_text("something longer that was there before")
    write_atomic(path, content)
    assert path.read_bytes() == "grün".encode()
    assert _files(tmp_path) == ["file.txt"]


def test_writer_is_given_the_same_suffix(tmp_path: Path) -> None:
    seen = []
    write_atomic(tmp_path / "a.safetensors", lambda path: (seen.append(path), path.write_bytes(b"x")))
    assert seen[0].suffix == ".safetensors"
    assert seen[0].parent == tmp_path


@posix
def test_a_write_that_the_system_refuses_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with _small_disk(1000), pytest.raises(UserError, match=f"Cannot write {path}: file too large"):
        write_atomic(path, b"x" * 5000)
    assert path.read_bytes() == b"old"
    assert _files(tmp_path) == ["file.bin"]


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
def test_a_failing_writer_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise failure

    expected = UserError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        write_atomic(tmp_path / "file.bin", write)
    assert _files(tmp_path) == []


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot write .*no such file or directory"):
        write_atomic(tmp_path / "nowhere" / "file.txt", "x")


# --- creating --------------------------------------------------------------------------------------------------------


def test_a_new_run_has_its_folder_and_settings(config: Config) -> None:
    with Run.open(config) as run:
        assert run.folder == Path(config.output, "test")
        assert load_yaml(run.config_path) == config
        assert _files(run.folder) == [".lock", "checkpoints", "config.yaml", "evaluations", "samples"]


def test_an_existing_run_is_not_touched(config: Config) -> None:
    Run.open(config).close()
    folder = Path(config.output, "test")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match="pass --resume .* or another --name"):
        Run.open(replace(config, seed=5))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_foreign_folder_is_not_touched(config: Config) -> None:
    folder = Path(config.output, "test")
    folder.mkdir(parents=True)
    (folder / "holiday.jpg").write_bytes(b"x")
    for attempt in (config, _resumed(config)):
        with pytest.raises(UserError, match="is not the folder of a run"):
            Run.open(attempt)
    assert _files(folder) == ["holiday.jpg"]


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_start_leaves_is_taken_over(config: Config, resume: bool) -> None:
    folder = Path(config.output, "test")
    (folder / "samples").mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / ".config-1234.tmp.yaml").write_text("half")
    with Run.open(replace(config, resume=resume)) as run:
        assert _files(run.folder) == [".lock", "checkpoints", "config.yaml", "evaluations", "samples"]


@posix
def test_a_full_disk_leaves_no_folder_behind(config: Config, tmp_path: Path) -> None:
    with _small_disk(100), pytest.raises(UserError, match="Cannot write"):
        Run.open(config)
    assert _files(tmp_path) == []


def test_no_permission_is_told(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UserError, match="Cannot make the folder .*permission denied"):
        Run.open(config)
    assert _files(tmp_path) == []


@pytest.mark.parametrize("output", ["a_file", "a_file/deeper", "x" * 300])
def test_an_impossible_output_is_told(config: Config, tmp_path: Path, output: str) -> None:
    (tmp_path / "a_file").write_text("x")
    with pytest.raises(UserError, match="Cannot make the folder"):
        Run.open(replace(config, output=str(tmp_path / output)))
    assert _files(tmp_path) == ["a_file"]


# --- the lock --------------------------------------------------------------------------------------------------------


def test_two_runs_cannot_share_a_folder(config: Config) -> None:
    with Run.open(config), pytest.raises(UserError, match="Another process is running"):
        Run.open(_resumed(config))
    Run.open(_resumed(config)).close()


@pytest.mark.slow
@pytest.mark.processes
@posix
def test_a_killed_process_leaves_no_lock(config: Config, tmp_path: Path) -> None:
    script = (
        "import sys, time; from dgpo_core.settings.yaml_file import load_yaml; from dgpo_core.runs.run import Run\n"
        "run = Run.open(load_yaml(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    settings = tmp_path / "settings.yaml"
    settings.write_text(to_yaml(config))
    process = subprocess.Popen([sys.executable, "-c", script, str(settings)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match="Another process is running"):
            Run.open(_resumed(config))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    Run.open(_resumed(config)).close()


@pytest.mark.processes
@posix
@pytest.mark.parametrize("delay", [0.0, 0.003, 0.01, 0.02, 0.05])
def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path: Path, delay: float) -> None:
    path = tmp_path / "file.bin"
    script = (
        "import itertools, sys; from dgpo_core.common.files import write_atomic\n"
        "for number in itertools.count():\n"
        "    write_atomic(sys.argv[1], bytes([number % 256]) * 1_000_000)\n"
        "    if not number: print('started', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"started\n"
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    content = path.read_bytes()
    assert len(content) == 1_000_000
    assert len(set(content)) == 1


# --- resuming --------------------------------------------------------------------------------------------------------


def test_nothing_to_resume_is_told(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no run to resume"):
        Run.open(_resumed(config))
    assert _files(tmp_path) == []


def test_resume_may_go_further_but_not_differ(config: Config) -> None:
    Run.open(config).close()
    changed = replace(config, training=replace(config.training, lr=0.1), seed=3)
    with pytest.raises(UserError, match=r"seed was 0 and is now 3 \(and 1 more: training.lr\)"):
        Run.open(_resumed(changed))
    with pytest.raises(UserError, match="iterations was 1000 and is now 999"):
        Run.open(_resumed(config, iterations=999))
    assert load_yaml(Path(config.output, "test", "config.yaml")) == config
    longer = replace(config, iterations=2000)
    with Run.open(_resumed(longer)) as run:
        assert load_yaml(run.config_path) == longer


def test_a_moved_run_resumes(config: Config, tmp_path: Path) -> None:
    Run.open(config).close()
    Path(config.output).rename(tmp_path / "elsewhere")
    Run.open(_resumed(config, output=str(tmp_path / "elsewhere"))).close()


def test_resume_clears_half_written_files(config: Config) -> None:
    with Run.open(config) as run:
        half = run.checkpoints / ".step_000010-1234.tmp.safetensors"
        half.write_bytes(b"half")
    Run.open(_resumed(config)).close()
    assert not half.exists()


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_one_json_line_each(config: Config) -> None:
    with Run.open(config) as run:
        run.append_metrics({"iteration": 1, "reward": 0.1 + 0.2, "phases": {"rollout": 1.5}})
        run.append_metrics({"iteration": 2, "reward": float("nan"), "note": "grün\n"})
        lines = run.metrics_path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == run.read_metrics()
        assert run.read_metrics()[0]["reward"] == 0.1 + 0.2
        assert run.read_metrics()[1]["reward"] is None


def test_metrics_go_on_after_the_checkpoint(config: Config) -> None:
    with Run.open(config) as run:
        for iteration in range(1, 6):
            run.append_metrics({"iteration": iteration})
        with open(run.metrics_path, "ab") as file:
            file.write(b'{"iteration": 6, "rew\xc3')
    with Run.open(_resumed(config)) as run:
        run.truncate_metrics(3)
        run.append_metrics({"iteration": 4, "again": True})
        assert run.read_metrics() == [
            {"iteration": 1},
            {"iteration": 2},
            {"iteration": 3},
            {"iteration": 4, "again": True},
        ]
        assert len(run.metrics_path.read_bytes().splitlines()) == 4
        run.truncate_metrics(-1)
        assert run.read_metrics() == []


def test_the_history_is_read_once_and_follows_what_is_written(config: Config) -> None:
    """A curve is drawn at every evaluation; reading a file that grows would make each dearer than the one before."""
    measured = {
        "iteration": 1,
        "held_out": 0.5,
        "held_out_ci95": [0.4, 0.6],
        "n": 8,
        "in_domain": {"mean": 1, "sem": 0},
    }
    with Run.open(config) as run:
        run.append_metrics({"iteration": 1, "reward": 0.5, "loss": 1.0})
        assert run.history() == [{"iteration": 1, "reward": 0.5}]
        run.metrics_path.write_bytes(b"")
        run.append_metrics(measured)
        run.append_metrics({"iteration": 2, "reward": float("nan"), "seconds": {"rollout": 1.0}})
        assert run.history() == [{"iteration": 1, "reward": 0.5}, measured, {"iteration": 2, "reward": None}]
        run.truncate_metrics(1)
        assert run.history() == [measured]


@posix
def test_metrics_on_a_full_disk_are_told(config: Config) -> None:
    with Run.open(config) as run:
        run.append_metrics({"iteration": 1})
        with _small_disk(25), pytest.raises(UserError, match="Cannot write .*metrics.jsonl"):
            run.append_metrics({"iteration": 2})
        run.truncate_metrics(2)
        assert run.read_metrics() == [{"iteration": 1}]


def test_json_files_hold_no_nan(config: Config) -> None:
    with Run.open(config) as run:
        run.write_json(run.summary_path, {"mean": float("inf"), "ci95": (0.1, float("nan"))})
        assert json.loads(run.summary_path.read_text()) == {"mean": None, "ci95": [0.1, None]}
