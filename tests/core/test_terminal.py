"""What cannot be printed ends no work: the other end of a pipe is gone, a disk with a log on it is full."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine import write_quick
from processes import ROOT

from dgpo_core import train

COMMAND = """
import sys
from dgpo_core.settings.command_line import command

def work(settings):
    for _ in range(1000):
        print("a line that fills the buffer of a stream at some time")
    print("an error", file=sys.stderr)
    open("done", "w").close()

sys.exit(command(lambda: None, work))
"""


def ended(folder: Path, program: list[str], stdout: int, **environment: str) -> int:
    """The exit code of Python with these arguments, in `folder`; it must have told nothing of a failure."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    done = subprocess.run(
        [sys.executable, *program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=300,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    return done.returncode


def nobody() -> int:
    """The end of a pipe that nobody reads from any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_command_goes_on_where_nobody_reads_what_it_prints(unbuffered: str, tmp_path: Path) -> None:
    assert ended(tmp_path, ["-c", COMMAND], nobody(), PYTHONUNBUFFERED=unbuffered) == 0
    assert (tmp_path / "done").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_command_goes_on_where_the_disk_with_its_log_is_full(unbuffered: str, tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    assert ended(tmp_path, ["-c", COMMAND], full, PYTHONUNBUFFERED=unbuffered) == 0
    assert (tmp_path / "done").exists()


@pytest.mark.slow
def test_a_training_whose_pipe_is_closed_ends_with_its_lora(sd3_folder: Path, tmp_path: Path) -> None:
    argv = write_quick(tmp_path, sd3_folder, iterations=1)
    program = [str(ROOT / "tests" / "helpers" / "bright.py"), *argv]
    assert ended(tmp_path, program, nobody(), PYTHONUNBUFFERED="1") == 0
    assert (tmp_path / "runs/test/lora.safetensors").exists()


def test_streams_are_as_before_once_a_command_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    assert train.main(["--iterations", "0"]) == 2
    assert (sys.stdout, sys.stderr) == before
    assert "iterations" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_prompts_are_written_to_a_name_that_the_terminal_cannot_show(encoding: str, tmp_path: Path) -> None:
    program = ["-m", "dgpo_core.prompts", "ocr", "--count", "2", "--out", "тест.jsonl"]
    assert ended(tmp_path, program, subprocess.PIPE, PYTHONIOENCODING=encoding) == 0
    assert (tmp_path / "тест.jsonl").exists()
