"""What bad input gets: one sentence, exit code 2, no traceback, and nothing written."""

import errno
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from dgpo_core import config_io
from dgpo_core.checkpoint import checkpoint_path
from dgpo_core.config import Config
from dgpo_core.run import Run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 with random weights."""
    return tiny.save("sd3", tmp_path_factory.mktemp("model"))


GOOD = """{"prompt": "red", "include": []}
{"prompt": "blue", "include": []}
"""


@dataclass(frozen=True)
class World:
    """Where a bad input is set up: `folder` is the test's own, `output` is where the run would go."""

    folder: Path
    model: Path

    @property
    def output(self) -> Path:
        return self.folder / "runs"

    @property
    def base(self) -> list[str]:
        """Arguments of a run that would work, but for what the case adds."""
        return [
            *("--preset", "quickstart", "--output", str(self.output), "--name", "test"),
            *("--model.path", str(self.model), "--model.height", "32", "--model.width", "32", "--model.device", "cpu"),
            *("--data.prompts", self.file("good.jsonl", GOOD), "--data.held_out", ""),
        ]

    def file(self, name: str, content: str | bytes) -> str:
        """Writes a file beside the runs; its path."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def lora(self, **tensors: torch.Tensor) -> str:
        """A LoRA file of one module; its path."""
        path = self.folder / "lora.safetensors"
        save_file({f"transformer.{key}": tensor for key, tensor in tensors.items()}, path)
        return str(path)

    def run(self, **changes: object) -> Run:
        """A run of the same name that is there already."""
        saved = replace(Config(), name="test", output=str(self.output), **changes)
        with Run.open(saved) as run:
            return run


Case = Callable[[World], list[str]]

A_LORA = {
    "transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 999),
    "transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(999, 4),
}
UNKNOWN_LORA = {
    "no_such_block.7.to_q.lora_A.weight": torch.zeros(4, 16),
    "no_such_block.7.to_q.lora_B.weight": torch.zeros(16, 4),
}

TRAIN: dict[str, tuple[Case, str]] = {
    # --- the command line and settings files
    "unknown option": (lambda w: ["--training.lrr", "1"], "did you mean --training.lr?"),
    "option without its group": (lambda w: ["--group_size", "8"], "did you mean --rollout.group_size?"),
    "stray word": (lambda w: ["quickstart"], "quickstart"),
    "option without a value": (lambda w: ["--training.lr"], "--training.lr"),
    "text for a number": (lambda w: ["--iterations", "many"], "many"),
    "unknown choice": (lambda w: ["--training.reference", "base"], "frozen"),
    "unknown preset": (lambda w: ["--preset", "quikstart"], "did you mean quickstart?"),
    "unknown mode": (lambda w: ["--mode", "4"], "known: 1, 2a, 2b"),
    "missing settings file": (lambda w: ["--config", "nowhere.yaml"], "settings file nowhere.yaml does not exist"),
    "settings file that is no YAML": (lambda w: ["--config", w.file("a.yaml", "a: [1")], "not valid YAML"),
    "settings file that is no text": (lambda w: ["--config", w.file("a.yaml", b"\xff\xfe\x00")], "not UTF-8 text"),
    "unknown key in a settings file": (
        lambda w: ["--config", w.file("a.yaml", "rollout: {step: 3}")],
        "did you mean rollout.steps?",
    ),
    "preset without prompts": (lambda w: ["--preset", "sd15-pickscore", "--data.prompts", ""], "--data.prompts FILE"),
    # --- numbers
    "group of one": (lambda w: ["--rollout.group_size", "1"], "nothing to be compared with"),
    "no iterations": (lambda w: ["--iterations", "0"], "iterations is 0 but must be at least 1"),
    "negative learning rate": (lambda w: ["--training.lr", "-1"], "training.lr is -1"),
    "learning rate that is no number": (lambda w: ["--training.lr", "nan"], "training.lr is nan"),
    "infinite beta": (lambda w: ["--training.beta", "inf"], "training.beta is inf"),
    "guidance below 1": (lambda w: ["--rollout.cfg", "0.5"], "rollout.cfg is 0.5"),
    "more timesteps than steps": (lambda w: ["--training.timesteps", "50"], "roll-out steps may be trained on"),
    "timestep clip in the middle of a step": (lambda w: ["--training.t_min", "3.5"], "training.t_min is 3.5"),
    "rank of zero": (lambda w: ["--lora.rank", "0"], "lora.rank is 0"),
    "image size off the grid": (lambda w: ["--model.height", "33"], "multiple of 8"),
    # --- prompts
    "missing prompt file": (lambda w: ["--data.prompts", "nowhere.txt"], "no prompt file nowhere.txt"),
    "empty prompt file": (lambda w: ["--data.prompts", w.file("a.txt", "\n# none\n")], "has no prompts"),
    "malformed JSONL": (lambda w: ["--data.prompts", w.file("a.jsonl", '{"prompt": "a"}\n{"pro')], "a.jsonl:2"),
    "JSONL without prompts": (lambda w: ["--data.prompts", w.file("a.jsonl", '{"text": "a"}')], "a.jsonl:1"),
    "prompt file in Latin-1": (lambda w: ["--data.prompts", w.file("a.txt", b"caf\xe9")], "UTF-8"),
    "prompt file of another kind": (lambda w: ["--data.prompts", w.file("a.csv", "a")], ".txt or .jsonl"),
    "missing held-out file": (lambda w: ["--data.held_out", "nowhere.jsonl"], "nowhere.jsonl"),
    # --- what settings name
    "unknown reward": (lambda w: ["--reward", "shapes_grade"], "shapes_graded"),
    "reward of no weight": (lambda w: ["--reward", "shapes=0"], "other than 0"),
    "no reward": (lambda w: ["--reward", ""], "There is no reward"),
    "unknown reward option": (
        lambda w: ["--config", w.file("a.yaml", "reward: [{name: shapes, options: {colour: red}}]")],
        "colour",
    ),
    "unknown solver": (lambda w: ["--rollout.solver", "eulr"], "euler"),
    "solver that adds noise": (lambda w: ["--rollout.solver", "euler_ancestral"], "euler"),
    "unknown evaluation solver": (lambda w: ["--evaluation.solver", "eulr"], "euler"),
    "missing model": (lambda w: ["--model.path", str(w.folder / "no model")], "no model"),
    "folder that is no model": (lambda w: ["--model.path", str(w.folder)], "model_index.json"),
    "checkpoint that is no model": (lambda w: ["--model.path", w.file("a.safetensors", b"garbage")], "a.safetensors"),
    "pickled model": (lambda w: ["--model.path", w.file("a.ckpt", b"\x80\x04K\x01.")], "a.ckpt"),
    "unknown family": (lambda w: ["--model.family", "sd4"], "sd4"),
    "family of another model": (lambda w: ["--model.family", "sdxl"], "sdxl"),
    "device that is not there": (lambda w: ["--model.device", "abacus"], "abacus"),
    "targets that the model has not": (lambda w: ["--lora.targets", "no_such_layer"], "no_such_layer"),
    "missing LoRA": (lambda w: ["--lora.init", "nowhere.safetensors"], "nowhere.safetensors"),
    "corrupt LoRA": (lambda w: ["--lora.init", w.file("a.safetensors", b"garbage")], "a.safetensors"),
    "LoRA of other shapes": (lambda w: ["--lora.init", w.lora(**A_LORA)], "lora.safetensors"),
    "LoRA of other modules": (lambda w: ["--lora.init", w.lora(**UNKNOWN_LORA)], "lora.safetensors"),
    # --- the run folder
    "run folder with a slash": (lambda w: ["--name", "a/b"], "cannot be a folder name"),
    "output that is a file": (lambda w: ["--output", w.file("taken", "x")], "Cannot make the folder"),
    "nothing to resume": (lambda w: ["--resume"], "There is no run to resume"),
}


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
    from dgpo_core.cli import parse_args

    with Run.open(parse_args(world.base)) as run:
        return [*world.base, "--resume"], run


def test_a_foreign_checkpoint_is_told(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dgpo_core.checkpoint import save_checkpoint

    argv, run = _started(World(tmp_path, model))
    save_checkpoint(checkpoint_path(run.checkpoints, 3), {"x": torch.zeros(1)}, {"step": 3, "fingerprint": "another"})
    assert "other settings" in _call("train", argv, capsys)


def test_a_corrupt_checkpoint_is_told(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dgpo_core.checkpoint import save_checkpoint

    world = World(tmp_path, model)
    argv, run = _started(world)
    path = checkpoint_path(run.checkpoints, 3)
    settings = config_io.load_yaml(run.config_path)
    save_checkpoint(path, {"x": torch.zeros(9)}, {"step": 3, "fingerprint": config_io.fingerprint(settings)})
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

EVALUATE: dict[str, tuple[Case, str]] = {
    "no LoRA named": (lambda w: [], "lora"),
    "unknown option": (lambda w: ["--lorra", "x"], "--lora"),
    "missing LoRA": (lambda w: ["--lora", "nowhere.safetensors"], "nowhere.safetensors"),
    "corrupt LoRA": (lambda w: ["--lora", w.file("a.safetensors", b"garbage")], "a.safetensors"),
    "pickled LoRA": (lambda w: ["--lora", w.file("a.bin", b"\x80\x04K\x01.")], "a.bin"),
    "LoRA of another model": (lambda w: ["--lora", w.lora(**UNKNOWN_LORA)], "lora.safetensors"),
}


@pytest.mark.parametrize(("case", "message"), EVALUATE.values(), ids=EVALUATE)
def test_bad_input_of_evaluate_is_told(
    case: Case, message: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = case(World(tmp_path, model))
    before = _files(tmp_path)
    assert message in _call("evaluate", argv, capsys).lower()
    assert _files(tmp_path) == before


# --- as a user types it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "argv", "message"),
    [
        ("train", ["--training.lrr", "1"], "error: There is no option --training.lrr, did you mean --training.lr?"),
        ("evaluate", ["--lora", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_a_process_ends_with_one_sentence(program: str, argv: list[str], message: str, tmp_path: Path) -> None:
    root = str(Path(config_io.__file__).parents[1])
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
    assert len(TRAIN) + len(EVALUATE) >= 25
