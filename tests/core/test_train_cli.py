"""Whole runs of `dgpo_core.train` and `dgpo_core.evaluate`, from the arguments to the files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import quick, write_quick
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from dgpo_core import evaluate, train
from dgpo_core.method.update import Update
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.runs import assemble
from dgpo_core.runs.checkpoint import latest_checkpoint, load_checkpoint
from dgpo_core.settings.yaml_file import load_yaml

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("rewards")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that trainings are started in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/test/metrics.jsonl").read_text().splitlines()]


def test_held_out_prompts_that_were_changed_are_told_and_compared_with_nothing_before(
    here: Path, sd3_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = write_quick(here, sd3_folder, iterations=1, evaluation={"every": 1})
    assert train.main(argv) == 0
    for iterations, prompts, told in ((3, "white\n", 1), (4, "white\n", 0)):
        (here / "held_out.txt").write_text(prompts)
        before = len(metrics(here))
        capsys.readouterr()
        assert train.main([*argv, "--resume", "--iterations", str(iterations)]) == 0
        assert capsys.readouterr().out.count("the held-out prompts are not those that the run began with") == told
        new = [line for line in metrics(here)[before:] if "in_domain" in line]
        assert ["gain" in line["in_domain"] for line in new] == [not (told and line is new[0]) for line in new]
        assert "base" not in json.loads((here / "runs/test/summary.json").read_text())


def test_without_held_out_prompts_samples_are_scored_by_what_is_trained(here: Path, sd3_folder: Path) -> None:
    data = {"held_out": ""}
    argv = write_quick(here, sd3_folder, iterations=1, data=data, evaluation={"reward": "shapes"})
    assert train.main([*argv, "--data.held_out", ""]) == 0
    assert len([*(here / "runs/test/samples").iterdir()]) >= 2


def test_a_run_leaves_what_it_promises_and_its_gain_can_be_measured_again(
    here: Path, sd3_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = write_quick(here, sd3_folder)
    assert train.main(argv) == 0
    output = capsys.readouterr()
    run = here / "runs/test"
    _check_files(run)
    _check_metrics(metrics(here))
    summary = json.loads((run / "summary.json").read_text())
    _check_summary(summary)
    for part in ("base", "adapter"):  # before and after, as the terminal shows them
        assert f"{summary[part]['mean']:.3f}" in output.out
    assert "lora.safetensors" in output.out
    assert str(Path("runs/test")) in output.out

    found = ["--lora", "runs/test/lora.safetensors", "--config", "runs/test/config.yaml"]
    assert evaluate.main([*found, "--json", "again.json", "--images", "6"]) == 0
    again = json.loads((here / "again.json").read_text())
    assert {row["model"] for row in again.pop("table")} == {"base", "test"}  # what is more than in the summary
    _check_summary(again)
    for part in ("base", "adapter"):
        assert again[part]["n"] == summary[part]["n"]
        # the adapter comes through a float32 file whose scale is applied in another place
        assert again[part]["mean"] == pytest.approx(summary[part]["mean"], abs=1e-5)
        assert again[part]["ci95"] == pytest.approx(summary[part]["ci95"], abs=1e-5)
    assert again["base"] == summary["base"]
    printed = capsys.readouterr().out
    assert f"{again['adapter']['mean']:.3f}" in printed
    assert "95 % interval" in printed


def _check_files(run: Path) -> None:
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    folders, files = (
        {"samples", "checkpoints", "evaluations"},
        {"config.yaml", "metrics.jsonl", "reward.png", "summary.json"},
    )
    assert names == {"lora.safetensors", *folders, *files}
    assert load_yaml(run / "config.yaml").training.timesteps == 2
    assert Image.open(run / "reward.png").size[0] > 300
    samples = sorted(path.name for path in (run / "samples").iterdir())
    assert samples == ["iteration_000000.png", "iteration_000002.png", "iteration_000003.png"]
    sizes = {Image.open(run / "samples" / name).size for name in samples}
    assert len(sizes) == 1  # the same prompts and seeds each time
    with safe_open(run / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["dgpo.step"] == "3"
    assert metadata["dgpo.rewards"] == "bright=1"
    assert {"dgpo.base", "dgpo.config", "modelspec.architecture"} <= set(metadata)
    assert any(value.abs().max() > 0 for key, value in load_file(run / "lora.safetensors").items() if "lora_B" in key)


def _check_metrics(records: list[dict[str, Any]]) -> None:
    assert [r["iteration"] for r in records if "reward" in r] == [1, 2, 3]
    assert [(r["iteration"], r["n"]) for r in records if "held_out" in r] == [(0, 6), (2, 4), (3, 6)]
    for record in records:
        if "reward" in record:
            assert set(record["seconds"]) == {"encode", "rollout", "reward", "update"}
            assert all(isinstance(record[name], float) for name in ("loss", "kl", "grad_norm", "clip_fraction"))


def _check_summary(summary: dict[str, Any]) -> None:
    assert set(summary) == {"reward", "base", "adapter", "seconds", "iterations"}
    assert (summary["reward"], summary["iterations"]) == ("bright", 3)
    assert summary["seconds"] > 0
    for part in ("base", "adapter"):
        assert set(summary[part]) == {"mean", "ci95", "n"}
        low, high = summary[part]["ci95"]
        assert low < summary[part]["mean"] < high
        assert summary[part]["n"] == 6


def test_a_run_needs_no_held_out_prompts(here: Path, sd3_folder: Path) -> None:
    argv = [*write_quick(here, sd3_folder, iterations=1), "--data.held_out", ""]
    assert train.main(argv) == 0
    summary = json.loads((here / "runs/test/summary.json").read_text())
    assert set(summary) == {"reward", "seconds", "iterations"}
    assert len(metrics(here)) == 1
    assert len(list((here / "runs/test/samples").iterdir())) == 2


def test_all_equal_rewards_are_told_in_the_terminal(
    here: Path, sd3_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(write_quick(here, sd3_folder, iterations=1, reward="flat", evaluation={"final_images": 0})) == 0
    told = "".join(capsys.readouterr())
    assert "Iteration 1: all rewards were equal within every group, so there was nothing to learn" in told
    lora = load_file(here / "runs/test/lora.safetensors")
    assert all(value.count_nonzero() == 0 for key, value in lora.items() if "lora_B" in key)


def test_modes_2a_and_2b_train_with_a_bfloat16_base_offload_and_checkpointing(here: Path, sd3_folder: Path) -> None:
    for mode in ("2a", "2b"):
        memory = {"gradient_checkpointing": True, "offload": True}
        argv = write_quick(here, sd3_folder, name=mode, iterations=2, memory=memory, evaluation={"final_images": 0})
        argv += ["--mode", mode, "--model.dtype", "bfloat16"]
        assert train.main(argv) == 0
        lora = load_file(here / "runs" / mode / "lora.safetensors")
        assert {value.dtype for value in lora.values()} == {torch.float32}
        assert any(value.count_nonzero() for key, value in lora.items() if "lora_B" in key)


def test_memory_settings_reach_the_model(sd3_folder: Path) -> None:
    for on in (True, False):
        memory = {"gradient_checkpointing": on, "offload": on}
        config = quick(model={"path": str(sd3_folder)}, memory=memory)
        policy, size = assemble.load_model(config, "cpu")
        assert size == (16, 16)
        assert (policy.offload, policy.network.gradient_checkpointing) == (on, on)


def test_a_loss_that_is_no_number_ends_the_run_with_the_last_good_state(
    here: Path, sd3_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = write_quick(here, sd3_folder, checkpoint={"every": 100}, evaluation={"every": 0, "final_images": 0})
    updates: list[Any] = []
    real, predict = Update.accumulate, DiffusersPolicy.predict

    def accumulate(update: Update, *args: Any) -> Any:
        updates.append(update)
        return real(update, *args)

    def broken(policy: DiffusersPolicy, *args: Any) -> torch.Tensor:
        f = predict(policy, *args)
        return f * float("nan") if len(updates) == 3 and torch.is_grad_enabled() else f

    with monkeypatch.context() as patch:
        patch.setattr(Update, "accumulate", accumulate)
        patch.setattr(DiffusersPolicy, "predict", broken)
        assert train.main(argv) == 2
    told = capsys.readouterr().err
    assert "error: The loss or its gradient is not a finite number in iteration 3: lower training.lr" in told
    assert "Traceback" not in told
    newest = latest_checkpoint(here / "runs/test/checkpoints")
    assert newest
    tensors, info = load_checkpoint(newest)
    assert info["step"] == 2
    assert all(torch.isfinite(value.float()).all() for value in tensors.values())
    assert train.main([*argv, "--resume"]) == 0  # whatever it was is mended
    assert [r["iteration"] for r in metrics(here)] == [1, 2, 3]


def test_a_reward_that_answers_nonsense_ends_the_run_with_the_last_good_state(
    here: Path, sd3_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bright

    argv = write_quick(here, sd3_folder, checkpoint={"every": 100}, evaluation={"every": 0, "final_images": 0})
    factors = iter([1.0, 1.0, float("nan")])  # the samples before the first iteration, the first and the second
    monkeypatch.setattr(bright.Bright, "score", lambda self, images, *_: images.mean((1, 2, 3)) * next(factors))
    assert train.main(argv) == 2
    assert "Reward 'bright' returned nan for sample 0" in capsys.readouterr().err
    newest = latest_checkpoint(here / "runs/test/checkpoints")
    assert newest
    assert load_checkpoint(newest)[1]["step"] == 1


def test_a_resumed_run_keeps_its_settings(here: Path, sd3_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = write_quick(here, sd3_folder, iterations=1, evaluation={"final_images": 0})
    assert train.main(argv) == 0
    before = {path: path.read_bytes() for path in (here / "runs").rglob("*") if path.is_file()}
    for options, message in (
        (["--resume", "--training.lr", "1e-3"], "training.lr was 0.01 and is now 0.001"),
        (["--resume", "--reward", "red"], "reward was"),
        ([], "pass --resume"),
    ):
        capsys.readouterr()
        assert train.main([*argv, *options]) == 2
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (here / "runs").rglob("*") if path.is_file()} == before
    # --resume alone is enough: the settings are the run's own
    assert train.main(["--resume", "--name", "test", "--output", "runs", "--iterations", "2"]) == 0
    assert [r["iteration"] for r in metrics(here)] == [1, 2]


@pytest.mark.processes
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_what_a_terminal_cannot_show_is_written_as_escapes(encoding: str, tmp_path: Path) -> None:
    """A name in Cyrillic on a Windows terminal of Western Europe: printing it must not end the run."""
    argv = ["--name", "Привет", "--output", str(tmp_path), "--resume"]
    process = subprocess.run(
        [sys.executable, "-m", "dgpo_core.train", *argv],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(train.__file__).parents[1]), "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 2
    told = process.stderr.decode(encoding)
    assert "There is no run to resume in" in told
    assert "\\u041f" in told
