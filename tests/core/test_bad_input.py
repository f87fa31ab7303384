"""What bad input gets: one sentence, exit code 2, no traceback, and nothing written."""

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from bad_inputs import commands, names, settings, train, yaml_files
from bad_inputs.world import Case, World

import dgpo_core
from dgpo_core.runs.checkpoint import checkpoint_path
from dgpo_core.runs.run import Run
from dgpo_core.settings.resuming import fingerprint
from dgpo_core.settings.yaml_file import load_yaml

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 with random weights."""
    return tiny.save("sd3", tmp_path_factory.mktemp("model"))


TRAIN = {**train.TRAIN, **settings.ROWS, **names.ROWS, **yaml_files.ROWS}


def _call(program: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command's `main`; asserts that it ends as a user's mistake should, and returns the sentence."""
    capsys.readouterr()
    code = importlib.import_module(f"dgpo_core.{program}").main(argv)
    told = capsys.readouterr().err
    assert code == 2, told
    assert "Traceback" not in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert len(told) < 500
    return told


def _files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("case", "message"), TRAIN.values(), ids=TRAIN)
def test_bad_input_is_told(
    case: Case, message: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(tmp_path, model)
    argv = [*world.base, *case(world)]
    before = _files(tmp_path)
    assert message in _call("train", argv, capsys)
    assert _files(tmp_path) == before


# --- cases that need a run to be there --------------------------------------------------------------------------------


def test_an_existing_run_is_told(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path, model)
    world.run()
    before = _files(world.output)
    assert "pass --resume" in _call("train", world.base, capsys)
    assert _files(world.output) == before


def test_a_resume_that_differs_is_told(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path, model)
    world.run(seed=5)
    before = _files(world.output)
    told = _call("train", ["--name", "test", "--output", str(world.output), "--resume", "--seed", "6"], capsys)
    assert "seed was 5 and is now 6" in told
    assert _files(world.output) == before


def _started(world: World) -> tuple[list[str], Run]:
    """The arguments that resume a run which has the settings of `world.base`."""
    from dgpo_core.runs.options import parse_args

    with Run.open(parse_args(world.base)) as run:
        return [*world.base, "--resume"], run


def test_a_foreign_checkpoint_is_told(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dgpo_core.runs.checkpoint import save_checkpoint

    argv, run = _started(World(tmp_path, model))
    save_checkpoint(checkpoint_path(run.checkpoints, 3), {"x": torch.zeros(1)}, {"step": 3, "fingerprint": "another"})
    assert "other settings" in _call("train", argv, capsys)


def test_a_corrupt_checkpoint_is_told(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dgpo_core.runs.checkpoint import save_checkpoint

    world = World(tmp_path, model)
    argv, run = _started(world)
    path = checkpoint_path(run.checkpoints, 3)
    settings = load_yaml(run.config_path)
    save_checkpoint(path, {"x": torch.zeros(9)}, {"step": 3, "fingerprint": fingerprint(settings)})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "damaged" in _call("train", argv, capsys)


@pytest.mark.parametrize("reason", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_a_folder_that_cannot_be_made_is_told(
    reason: int, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, model)
    argv = world.base
    real = os.mkdir

    def refuse(path: str, *args: object, **options: object) -> None:
        if str(path).startswith(str(world.output)):
            raise OSError(reason, os.strerror(reason), path)
        real(path, *args, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    assert os.strerror(reason).lower() in _call("train", argv, capsys).lower()
    assert not world.output.exists()


def test_a_full_disk_is_told(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, model)
    argv = world.base

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "no space left on device" in _call("train", argv, capsys)
    assert not world.output.exists()


# --- measuring a LoRA again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("program", "case", "message"), commands.ROWS.values(), ids=commands.ROWS)
def test_bad_input_of_another_command_is_told(
    program: str, case: Case, message: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = case(World(tmp_path, model))
    before = _files(tmp_path)
    assert message.lower() in _call(program, argv, capsys).lower()
    assert _files(tmp_path) == before


# --- as a user types it ----------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize(
    ("program", "argv", "message"),
    [
        ("train", ["--training.lrr", "1"], "error: There is no option --training.lrr, did you mean --training.lr?"),
        ("evaluate", ["--lora", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_a_process_ends_with_one_sentence(program: str, argv: list[str], message: str, tmp_path: Path) -> None:
    root = str(Path(dgpo_core.__file__).parents[1])
    process = subprocess.run(
        [sys.executable, "-m", f"dgpo_core.{program}", *argv],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 2
    assert message in process.stderr
    assert process.stderr.count("\n") == 1
    assert process.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_table_is_long_enough() -> None:
    assert len(TRAIN) + len(commands.ROWS) >= 200
