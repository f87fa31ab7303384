"""Trackers: what a run tells them, and that nothing they do or lack ends a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker

from dgpo_core import train
from dgpo_core.settings.config import Config
from dgpo_core.settings.yaml_file import load_yaml

QUICK = ["--preset", "quickstart", "--name", "run", "--model.device", "cpu", "--iterations", "2"]
QUICK += ["--data.groups_per_iteration", "1", "--rollout.group_size", "4", "--checkpoint.every", "1"]
QUICK += ["--evaluation.every", "1", "--evaluation.images", "4", "--evaluation.final_images", "4"]


class Noted(GeneralTracker):
    """Keeps what it is told."""

    name = "wandb"
    requires_logging_directory = False
    made: list[Noted]

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__(_blank=True)
        self.project, self.options = project, options
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.pictures: list[tuple[int, str, tuple[int, int]]] = []
        self.over = False
        type(self).made.append(self)

    def start(self) -> None:
        pass

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.logged.append((step or 0, values))

    def log_images(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.pictures += [(step or 0, name, images[0].size) for name, images in values.items()]

    def finish(self) -> None:
        self.over = True


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Noted]:
    """In the place of Weights & Biases; the folder is the test's own."""
    monkeypatch.chdir(tmp_path)
    Noted.made = []
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Noted)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["wandb"])
    return Noted


@pytest.mark.slow
def test_a_tracker_gets_settings_every_iteration_evaluations_and_samples(noted: type[Noted]) -> None:
    assert train.main([*QUICK, "--track", "wandb"]) == 0
    (tracker,) = noted.made
    assert (tracker.project, tracker.options) == ("dgpo", {"name": "run"})
    assert tracker.settings["training/lr"] == 1e-3
    assert tracker.over
    rewards = {step: values["reward"] for step, values in tracker.logged if "reward" in values}
    assert rewards.keys() == {1, 2}
    assert all("seconds/update" in values for _, values in tracker.logged if "reward" in values)
    assert {step for step, values in tracker.logged if any(key.startswith("held_out") for key in values)} == {0, 1, 2}
    assert [step for step, *_ in tracker.pictures] == [0, 1, 2]
    assert all(isinstance(value, int | float) for _, values in tracker.logged for value in values.values())


@pytest.mark.slow
def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(
    noted: type[Noted], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(noted, "log", fails)
    assert train.main([*QUICK, "--track", "wandb"]) == 0
    told = capsys.readouterr()
    assert (told.out + told.err).count("the tracker failed, and the run goes on without it: ConnectionError") == 1
    assert Path("runs/run/lora.safetensors").is_file()


def test_a_package_that_is_missing_is_told_before_anything_is_written(
    noted: type[Noted], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*QUICK, "--track", "trackio"]) == 2
    assert (
        "--track trackio needs the package trackio, which is not installed: run `pip install trackio`."
        in capsys.readouterr().err
    )
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_folder_that_is_resumed_does_not_decide_where_data_go(noted: type[Noted]) -> None:
    assert train.main([*QUICK, "--track", "wandb"]) == 0
    assert load_yaml("runs/run/config.yaml", Config()).track == "wandb"
    assert train.main(["--name", "run", "--resume", "--iterations", "3"]) == 0
    assert len(noted.made) == 1
    assert train.main(["--name", "run", "--resume", "--iterations", "4", "--track", "wandb"]) == 0
    assert [step for step, values in noted.made[1].logged if "reward" in values] == [4]


@pytest.mark.slow
def test_tensorboard_has_its_files_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    assert train.main([*QUICK, "--track", "tensorboard"]) == 0
    events = EventAccumulator("runs/run/tensorboard")
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2]
    assert [event.step for event in events.Images("samples")] == [0, 1, 2]
