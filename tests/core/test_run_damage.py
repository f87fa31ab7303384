"""A run folder with something wrong in it: left out with a word, or told at the start; never after the training."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import write_quick

from dgpo_core.common.group import Group
from dgpo_core.evaluation.alarm import Alarm
from dgpo_core.evaluation.evaluator import Watch
from dgpo_core.evaluation.scores import Evaluation
from dgpo_core.method.step import Step
from dgpo_core.policy.lora import file as lora_file
from dgpo_core.rewards.taste.features import BuiltIn
from dgpo_core.rewards.taste.model import Agreement, Taste
from dgpo_core.runs.checkpoint import best_checkpoint, load_checkpoint, save_checkpoint
from dgpo_core.train import main

pytestmark = pytest.mark.slow

CHANGES = {"iterations": 2, "training": {"timesteps": 1}, "evaluation": {"every": 1, "images": 2, "final_images": 2}}


@pytest.fixture(scope="module")
def finished(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two iterations."""
    folder = tmp_path_factory.mktemp("finished")
    before = os.getcwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        import bright

        bright.register(patch.setitem)
        assert main(write_quick(folder, sd3_folder, **CHANGES)) == 0
    os.chdir(before)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewards: None) -> Path:
    """A run's folder of the test's own, inside the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/test"


def resume() -> int:
    return main(["--config", "quick.yaml", "--resume", "--iterations", "3"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_that_draw_nothing_are_kept_by_no_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run would go on from them, fail at once, and keep them once more in the place of a checkpoint before."""
    real, before = Step.draw, sorted(path.name for path in (run / "checkpoints").iterdir())

    def draw(step: Step, *about: Any) -> list[Group]:
        if step.iteration == 3:
            for parameter in step.policy.adapter_state("current").values():
                parameter.detach().fill_(float("nan"))
        return real(step, *about)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "draw", draw)
        assert main(["--config", "quick.yaml", "--resume", "--iterations", "5", "--checkpoint.every", "9"]) == 2
    told = capsys.readouterr()
    assert "Stopped after iteration 3 of 5; its weights are not kept." in told.out
    assert "is no picture" in told.err
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    assert main(["--config", "quick.yaml", "--resume", "--iterations", "5"]) == 0


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------

LOOK = '"iteration": 0, "held_out": 0.5, "n": 2'
LINES = {
    "no iteration": '{"reward": 0.5}',
    "an iteration in words": '{"iteration": "one", "reward": 0.5}',
    "an iteration that is true": '{"iteration": true, "reward": 0.5}',
    "a negative iteration": '{"iteration": -1, "reward": 0.5}',
    "an iteration of 10^18": '{"iteration": 1000000000000000000, "reward": 0.5}',
    "an iteration of 5000 digits": '{"iteration": ' + "9" * 5000 + "}",
    "a list": "[1, 2]",
    "a text": '"reward"',
    "nothing": "null",
    "no JSON": "reward 0.5",
    "half a character": '{"iteration": 1, "note": "\\ud800"}',
    "nested without end": '{"iteration": 1, "reward": ' + "[" * 100_000,
    "a reward in words": '{"iteration": 1, "reward": "high"}',
    "a reward that is no number": '{"iteration": 1, "reward": NaN}',
    "an infinite reward": '{"iteration": 1, "reward": 1e400}',
    "a reward that is a list": '{"iteration": 1, "reward": [1]}',
    "an evaluation without an interval": "{" + LOOK + ', "in_domain": {"mean": 1, "sem": 1}}',
    "an evaluation with half an interval": "{" + LOOK + ', "held_out_ci95": [1], "in_domain": {"mean": 1, "sem": 1}}',
    "an evaluation without what it measured": "{" + LOOK + ', "held_out_ci95": [0, 1]}',
    "an evaluation in words": "{" + LOOK + ', "held_out_ci95": [0, 1], "in_domain": {"mean": "x", "sem": 1}}',
    "a watched reward without numbers": '{"iteration": 1, "watch/entropy": 3}',
}


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_of_metrics_that_is_none_is_left_out_with_one_warning(
    line: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run / "metrics.jsonl"
    good = metrics.read_text().splitlines()
    metrics.write_text("\n".join([line, *good, line]) + "\n")
    assert resume() == 0
    told = capsys.readouterr()
    assert told.out.count("Warning: 2 line(s) of metrics.jsonl cannot be read and are left out.") == 1
    assert "Traceback" not in told.err
    records = [json.loads(each) for each in metrics.read_text().splitlines()]
    assert [r["iteration"] for r in records if "reward" in r] == [1, 2, 3]
    assert json.loads((run / "summary.json").read_text())["base"]["n"] == 2


@pytest.mark.slow
def test_a_line_that_a_killed_process_left_half_written_is_left_out_silently(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"iteration": 3, "rew')
    assert resume() == 0
    assert "metrics.jsonl" not in capsys.readouterr().out


@pytest.mark.slow
def test_without_any_metrics_the_run_still_ends(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\x00" * 1000)
    assert resume() == 0
    assert (run / "lora.safetensors").is_file()
    assert "base" not in json.loads((run / "summary.json").read_text())


# --- what is no file -------------------------------------------------------------------------------------------------


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("instead", [_folder, _pipe])
@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "config.yaml", "summary.json", "reward.png", "lora.safetensors"),
        *("checkpoints/step_000002.safetensors", "checkpoints/best.safetensors"),
    ],
)
def test_what_is_no_file_is_told_at_the_start(
    name: str, instead: Callable[[Path], None], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if instead is _pipe and not hasattr(os, "mkfifo"):
        pytest.skip("There are no named pipes on this system.")
    instead(run / name)
    before = contents(run / "evaluations")
    assert resume() == 2
    told = capsys.readouterr().err
    assert f"{name} cannot be read: it is" in told
    assert told.count("\n") == 1
    assert contents(run / "evaluations") == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["samples", "evaluations", "checkpoints"])
def test_a_file_in_place_of_a_folder_is_told_at_the_start(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / name)
    (run / name).write_text("a file")
    assert resume() == 2
    assert f"Cannot make the folder runs/test/{name}" in capsys.readouterr().err


def test_a_folder_that_takes_no_files_is_told_at_the_start(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "samples")
    before = contents(run)
    assert resume() == 2
    assert "Cannot write into runs/test/samples: permission denied." in capsys.readouterr().err
    assert contents(run) == before


# --- evaluations -----------------------------------------------------------------------------------------------------


def _places(path: Path) -> None:
    Evaluation(0, torch.zeros(2, 3, dtype=torch.int64), {"bright": torch.zeros(2)}).save(path)


def _scores(path: Path) -> None:
    Evaluation(0, torch.zeros(2, 2, dtype=torch.int64), {"bright": torch.zeros(3)}).save(path)


def _other(path: Path) -> None:
    Evaluation(0, torch.zeros(2, 2, dtype=torch.int64), {"another": torch.zeros(2)}).save(path)


def _nan(path: Path) -> None:
    Evaluation(0, torch.zeros(2, 2, dtype=torch.int64), {"bright": torch.full((2,), torch.nan)}).save(path)


def _negative(path: Path) -> None:
    Evaluation(-5, torch.zeros(2, 2, dtype=torch.int64), {"bright": torch.zeros(2)}).save(path)


def _checkpoint(path: Path) -> None:
    save_checkpoint(path, {"places": torch.zeros(2)}, {})


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.slow
@pytest.mark.parametrize("damage", [_empty, _folder, _places, _scores, _other, _nan, _negative, _checkpoint])
def test_an_evaluation_that_cannot_be_read_is_left_out_with_one_warning(
    damage: Callable[[Path], None], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / "evaluations/iteration_000000.safetensors")
    assert resume() == 0
    told = capsys.readouterr()
    assert told.out.count("Warning: 1 file(s) in evaluations/ cannot be read and are left out.") == 1
    assert "Traceback" not in told.err


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _rewritten(**changes: object) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        tensors, info = load_checkpoint(path)
        save_checkpoint(path, tensors, {name: value for name, value in {**info, **changes}.items() if value != "gone"})

    return rewrite


def _without_rng(path: Path) -> None:
    tensors, info = load_checkpoint(path)
    save_checkpoint(path, {name: value for name, value in tensors.items() if name != "rng/cpu"}, info)


def _without_moments(path: Path) -> None:
    tensors, info = load_checkpoint(path)
    save_checkpoint(path, {name: value for name, value in tensors.items() if "exp_avg_sq" not in name}, info)


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


BAD_INFO = [_rewritten(step="gone"), _rewritten(step="x"), _rewritten(step=None), _rewritten(old_is_current="gone")]


@pytest.mark.parametrize("damage", [_flipped, _without_rng, _without_moments, *BAD_INFO])
def test_a_checkpoint_that_is_no_trainings_state_is_told_and_changes_nothing(
    damage: Callable[[Path], None], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / "checkpoints/step_000002.safetensors")
    before = {name: data for name, data in contents(run).items() if not name.endswith("config.yaml")}
    assert resume() == 2
    told = capsys.readouterr().err
    assert "damaged" in told or "does not hold the state of a training" in told
    assert told.count("\n") == 1
    assert {name: data for name, data in contents(run).items() if not name.endswith("config.yaml")} == before


@pytest.mark.slow
def test_a_newest_checkpoint_without_content_is_passed_over(run: Path) -> None:
    _empty(run / "checkpoints/step_000002.safetensors")
    assert resume() == 0


def _taste(path: Path, sign: float) -> None:
    """One that finds red better, or worse."""
    weights = torch.zeros(BuiltIn().width)
    weights[12] = sign
    Taste("built-in", weights, torch.zeros_like(weights), 50, 400, 900, Agreement(0.9, 0.85, 0.95, 50)).save(path)


def test_a_taste_that_was_fitted_anew_is_refused_and_changes_no_checkpoint(
    sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = write_quick(tmp_path, sd3_folder, **CHANGES | {"reward": "taste=my.safetensors"})
    _taste(Path("my.safetensors"), 1.0)
    assert main(argv) == 0
    before = contents(tmp_path / "runs/test/checkpoints")
    _taste(Path("my.safetensors"), -1.0)
    assert resume() == 2
    assert "The taste my.safetensors is not the one that the run began with" in capsys.readouterr().err
    assert contents(tmp_path / "runs/test/checkpoints") == before
    _taste(Path("my.safetensors"), 1.0)
    assert resume() == 0


# --- the best state after an alarm -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("damage", [Path.unlink, _empty, _folder, _flipped, _rewritten(step="gone")])
def test_where_the_best_state_cannot_be_read_the_run_ends_with_the_nearest_and_says_which(
    damage: Callable[[Path], None],
    sd3_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rewards: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The alarm goes off at iteration 4; the evaluation of iteration 1 was the best."""
    left = [best_checkpoint(tmp_path / "runs/test/checkpoints")]

    def alarms(watch: Watch, history: list[Evaluation]) -> list[Alarm]:
        if history and history[-1].iteration >= 4:
            while left:
                damage(left.pop())
            return [Alarm("entropy", 1, 4, 2.0, 1.0, (0.1, 0.2))]
        return []

    monkeypatch.setattr(Watch, "alarms", alarms)
    monkeypatch.setattr(Watch, "best", lambda watch, history: history[min(1, len(history) - 1)])
    monkeypatch.chdir(tmp_path)
    argv = write_quick(tmp_path, sd3_folder, **{**CHANGES, "iterations": 9}, checkpoint={"every": 1, "keep": 2})
    assert main([*argv, "--evaluation.on_alarm", "stop"]) == 0
    said = capsys.readouterr().out
    assert "Stopped after iteration 4; lora.safetensors is the adapter after iteration 3, as the best" in said
    assert "(iteration 1) cannot be read from best.safetensors any more." in said
    assert lora_file.read(tmp_path / "runs/test/lora.safetensors").metadata["dgpo.step"] == "3"
    summary = json.loads((tmp_path / "runs/test/summary.json").read_text())
    assert (summary["stopped_at"], summary["iterations"]) == (4, 3)
