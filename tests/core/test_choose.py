"""What "auto" chooses for a number of free bytes: it fits by the count, costs no result, and is kept over a resume."""

import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import engine
import pytest
import tiny
import torch

from dgpo_core.benchmark.advice import GIB, peak
from dgpo_core.benchmark.auto import decided
from dgpo_core.benchmark.choose import Choice, choose, choose_for, probe
from dgpo_core.runs.run import Run
from dgpo_core.settings.config import AUTO, Config
from dgpo_core.settings.resuming import OPEN, fingerprint, left_open
from dgpo_core.settings.values import from_dict, to_dict
from dgpo_core.settings.yaml_file import to_yaml


def settings(**changes: dict[str, object]) -> Config:
    """Nothing is fixed but the size of the work, and what `changes` fixes."""
    base = engine.quick(rollout={"cfg": 4.5, "group_size": 6}, data={"groups_per_iteration": 2})
    every = {group: {name.partition(".")[2]: AUTO for name in OPEN if name.startswith(f"{group}.")} for group in GROUPS}
    model = {"path": str(tiny.folder("sdxl")), "height": tiny.SIZE, "width": tiny.SIZE, "dtype": "bfloat16"}
    return from_dict(changes, from_dict({"model": model}, from_dict(every, base)))


GROUPS = ("rollout", "training", "evaluation", "memory", "model")


@functools.cache
def chosen(share: float) -> Choice:
    """By `share` of the bytes that the roomiest choice takes."""
    most = choose(settings(), 20 * GIB, probe(20 * GIB)).needs
    return choose(settings(), share * most, probe(share * most))


@pytest.mark.slow
def test_where_there_is_room_nothing_is_computed_twice_and_no_group_is_cut() -> None:
    choice = choose(settings(), 20 * GIB, probe(20 * GIB))
    assert left_open(choice.config) == []
    assert not choice.config.memory.gradient_checkpointing
    assert not choice.config.memory.offload
    assert choice.config.training.at_once >= 6
    assert choice.config.model.quantize == "none"


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.9, 0.75])
def test_what_is_chosen_fits_when_the_whole_iteration_is_counted(share: float) -> None:
    choice = chosen(share)
    assert choice.fits
    count = probe(choice.room)
    assert peak(count(choice.config)[0])[1] <= choice.room
    assert all(name in choice.said for name in OPEN)


@pytest.mark.slow
def test_a_base_is_quantised_only_where_the_whole_one_does_not_fit_at_its_smallest() -> None:
    whole = settings(model={"quantize": "none"})
    least = choose(whole, 2**16, probe(2**16)).needs
    assert choose(settings(), least, probe(least)).config.model.quantize == "none"
    assert choose(settings(), least - 1, probe(least - 1)).config.model.quantize != "none"


@pytest.mark.slow
def test_what_is_fixed_by_hand_stays() -> None:
    fixed = settings(training={"micro_batch": 3}, memory={"gradient_checkpointing": True}, rollout={"batch": 0})
    choice = choose(fixed, 20 * GIB, probe(20 * GIB)).config
    assert (choice.training.micro_batch, choice.memory.gradient_checkpointing, choice.rollout.batch) == (3, True, 0)


@pytest.mark.slow
def test_what_does_not_fit_says_how_much_is_missing_and_what_else_to_set() -> None:
    choice = choose(settings(), 2**16, probe(2**16))
    assert not choice.fits
    assert "GiB are missing" in choice.said
    assert "model.height" in choice.said


@pytest.mark.slow
def test_a_model_that_cannot_be_counted_is_as_by_default_and_says_why() -> None:
    unknown = settings(model={"path": "somebody/model"})
    choice = choose_for(unknown, 20 * GIB, "a card of tomorrow")
    assert choice.config == unknown
    assert "somebody/model" in choice.said


@pytest.mark.slow
def test_before_a_run_on_a_gpu_the_choice_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (8 * GIB, 12 * GIB))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA GeForce RTX 4070")
    told: list[str] = []
    config = decided(settings(), SimpleNamespace(device=torch.device("cuda"), leads=True, gather=list), told.append)
    assert left_open(config) == []
    assert len(told) == 1
    assert "of 7.7 GiB" in told[0]
    assert decided(settings(), SimpleNamespace(device=torch.device("cpu")), told.append) == settings()
    assert len(told) == 1


def test_auto_without_a_card_is_what_the_defaults_have_always_been() -> None:
    config = Config()
    assert left_open(config) == list(OPEN)
    assert (config.rollout.at_once, config.training.at_once, config.evaluation.at_once) == (8, 4, 8)
    assert (config.memory.recompute, config.memory.move, config.model.kept_as) == (True, True, "none")


def test_a_resumed_run_takes_what_was_chosen_when_it_began(tmp_path: Path) -> None:
    begun = from_dict({"training": {"micro_batch": 7}, "model": {"quantize": "int8"}}, Config(output=str(tmp_path)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(to_yaml(replace(begun, name="mine")))
    asked = Config(name="mine", output=str(tmp_path), resume=True)
    again = Run.as_before(asked)
    assert (again.training.micro_batch, again.model.quantize) == (7, "int8")
    by_hand = replace(asked, training=replace(asked.training, micro_batch=2))
    assert Run.as_before(by_hand).training.micro_batch == 2
    assert Run.as_before(replace(asked, resume=False)).training.micro_batch == AUTO
    (tmp_path / "mine" / "config.yaml").write_text(to_yaml(replace(begun, name="mine", model=Config().model)))
    assert Run.as_before(asked).model.quantize == "none"  # another base would be another training


def test_checkpoints_from_before_there_was_auto_still_fit() -> None:
    before = from_dict({"model": {"quantize": "none"}}, Config())
    assert fingerprint(before) == fingerprint(Config())
    assert to_dict(before) != to_dict(Config())
