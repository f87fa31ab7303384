"""Paths that cannot be used: those to write to are told before the work, those to read from in one sentence."""

import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from engine import write_quick
from PIL import Image
from processes import train_in, train_together

from dgpo_core import bench, evaluate, fit, train
from dgpo_core.common.errors import UserError
from dgpo_core.common.files import require_writable
from dgpo_core.common.prompts import load_prompts
from dgpo_core.demo import rater
from dgpo_core.people import taste
from dgpo_core.runs import assemble


class Worked(Exception):
    """The work has begun."""


def work(*args: Any) -> None:
    raise Worked


@pytest.mark.parametrize(
    ("main", "room", "name", "argv"),
    [
        (bench.main, bench, "Bench", ["--json"]),
        (rater.main, rater, "simulate", ["--json"]),
        (taste.main, taste, "read_answers", ["answers.jsonl", "--out"]),
    ],
    ids=["bench", "rater", "taste"],
)
def test_a_place_that_is_not_there_is_told_before_the_work(
    main: Callable[[Sequence[str]], int],
    room: Any,
    name: str,
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(room, name, work)
    place = tmp_path / "nowhere" / "a.safetensors"
    assert main([*argv, str(place)]) == 2
    assert f"Cannot write {place}: no such file or directory." in capsys.readouterr().err
    with pytest.raises(Worked):
        main([*argv, str(tmp_path / "a.safetensors")])
    assert list(tmp_path.iterdir()) == []


def test_where_a_file_cannot_be_written_is_known_and_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file" / "a.json", tmp_path, tmp_path / ("a" * 300)):
        with pytest.raises(UserError, match="Cannot write"):
            require_writable(path)
    require_writable(tmp_path / "file")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_a_training_loads_nothing_for_an_output_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "open_session", work)
    with pytest.raises(Worked):
        train.main(["--model.device", "cpu"])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Path, "touch", refuse)
    assert train.main(["--model.device", "cpu"]) == 2
    folder = Path("runs", "quickstart")
    assert capsys.readouterr().err == f"error: Cannot make the folder {folder}: read-only file system.\n"


LONG = "a" * 300


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (train.main, ["--data.prompts", f"{LONG}.txt"]),
        (train.main, ["--data.held_out", f"{LONG}.jsonl"]),
        (train.main, ["--data.text", "a __b__", "--data.wildcards", "2", "--data.wildcard_folder", LONG]),
        (train.main, ["--model.path", LONG, "--model.device", "cpu"]),
        (train.main, ["--groups", LONG]),
        (train.main, ["--reward", f"{LONG}.py:Name"]),
        (train.main, ["--reward", f"taste={LONG}.safetensors"]),
        (fit.main, ["--model", LONG]),
        (taste.main, [LONG]),
    ],
    ids=lambda value: " ".join(value).replace(LONG, "LONG") if isinstance(value, list) else "",
)
def test_a_name_that_is_too_long_is_one_sentence(
    main: Callable[[Sequence[str]], int],
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert capsys.readouterr().err.endswith("cannot be read: file name too long.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_of_a_name_that_is_too_long_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "make it night", "image": f"{LONG}.png"}))
    with pytest.raises(UserError, match="there is no picture"):
        load_prompts(tmp_path / "prompts.jsonl")


def test_what_is_in_somebody_elses_folder_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(UserError, match=r"The prompt file theirs/a.txt cannot be read: permission denied\."):
        load_prompts("theirs/a.txt")


@pytest.mark.slow
@pytest.mark.usefixtures("rewards")
@pytest.mark.parametrize("place", ["--json nowhere/a.json", "--report held_out.txt"])
def test_an_evaluation_is_not_made_for_a_place_that_cannot_be_written(
    place: str, sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = write_quick(tmp_path, sd3_folder, iterations=1)
    assert train_in(tmp_path, argv) == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assemble, "load_model", work)
    assert evaluate.main([*argv, "--lora", "runs/test/lora.safetensors", *place.split()]) == 2
    assert "error: Cannot" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.processes
def test_the_report_of_two_processes_shows_what_that_of_one_does(sd3_folder: Path, tmp_path: Path) -> None:
    """Of 18 prompts, each third is shown: three of them are drawn by either process."""
    argv = write_quick(tmp_path, sd3_folder, iterations=1)
    assert train_in(tmp_path, argv) == 0
    (tmp_path / "held_out.txt").write_text("".join(f"{n} {'red ' * n}\n" for n in range(18)))
    argv += ["--lora", "runs/test/lora.safetensors", "--images", "36", "--device", "cpu"]
    assert train_in(tmp_path, [*argv, "--report", "one"], "measure_instead") == 0
    assert train_together(tmp_path, [*argv, "--report", "two"], 2, "measure_instead") == [0, 0]
    one, two = (Image.open(tmp_path / name / "report.png").convert("L") for name in ("one", "two"))
    assert one.size == two.size
    # the same pictures in the same order, but for rounding
    assert max(abs(a - b) for a, b in zip(one.tobytes(), two.tobytes(), strict=True)) < 16
