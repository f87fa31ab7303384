"""A family, a solver and a reward from outside are one class or function and one line of their table each."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import single_file
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from engine import write_quick
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgpo_core.diffusion.solvers import SOLVERS, Reset, Schedule
from dgpo_core.policy import FAMILIES
from dgpo_core.policy.families.sd15 import SD15
from dgpo_core.rewards import REWARDS, Reward
from dgpo_core.train import main

MARK = "nice_blocks.0.weight"


class Nice(SD15):
    """SD1.5 with one tensor more in its checkpoints, by which they are known; LoRAs are on its queries alone."""

    family = "nice"
    pipeline_classes = ("StableDiffusionPipeline",)
    marks = (MARK,)
    targets = ("to_q",)
    architecture = "nice-1"
    base_version = "nice_1"


class OneMore(FlowMatchEulerDiscreteScheduler):
    """Euler's steps, counted."""

    taken = 0

    def step(self, *args: Any, **kwargs: Any) -> Any:
        OneMore.taken += 1
        return super().step(*args, **kwargs)


def one_more(s: Schedule) -> tuple[Any, Reset]:
    """A solver of one step more than it is asked for."""
    scheduler = OneMore()
    return scheduler, lambda: scheduler.set_timesteps(s.steps + 1)


class Darkness(Reward):
    """How dark an image is."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return 1 - images.mean((1, 2, 3))


@pytest.fixture
def nice(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of the new family, which is looked for before the one that it resembles, and is gone afterwards."""
    pipe = tiny.sd15(tmp_path / "made")
    path = single_file.write(pipe, tmp_path / "nice.safetensors")
    save_file({**load_file(path), MARK: torch.zeros(2)}, path)
    pipe.save_pretrained(tmp_path / "nice")  # its configs and its tokenizer
    before = dict(FAMILIES)
    FAMILIES.clear()
    FAMILIES.update({"nice": Nice, **before})
    yield path
    FAMILIES.clear()
    FAMILIES.update(before)


def train(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """One iteration on `model`, into `folder`/runs/test."""
    monkeypatch.chdir(folder)
    options = {"iterations": 1, "evaluation": {"every": 0, "final_images": 2}, **changes}
    assert main(write_quick(folder, model, **options)) == 0


@pytest.mark.slow
def test_a_family_from_outside_is_known_by_its_marks_and_trained(
    nice: Path, tmp_path: Path, rewards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, nice, monkeypatch)
    with safe_open(tmp_path / "runs/test/lora.safetensors", "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "nice-1/lora"
        assert {key.split(".lora")[0].rpartition(".")[2] for key in file.keys()} == {"to_q"}  # noqa: SIM118


@pytest.mark.slow
def test_a_solver_from_outside_draws_what_is_trained_on(
    sd3_folder: Path, tmp_path: Path, rewards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOLVERS["flow"], "one_more", one_more)
    train(tmp_path, sd3_folder, monkeypatch, rollout={"solver": "one_more"})
    assert OneMore.taken
    assert OneMore.taken % 4 == 0  # of the three that the settings say


@pytest.mark.slow
def test_a_reward_from_outside_is_what_is_trained_for(
    sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(REWARDS, "darkness", f"{__name__}:Darkness")
    train(tmp_path, sd3_folder, monkeypatch, reward="darkness")
    assert "darkness on held-out prompts" in capsys.readouterr().out
