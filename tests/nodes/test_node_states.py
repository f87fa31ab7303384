"""The states of a run on disk: what is kept, which of them the run goes by, and what a crash leaves; no ComfyUI."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from node_files import node_file

from dgpo_core.common.errors import UserError
from dgpo_core.settings.config import LoraConfig, MemoryConfig, ModelConfig

states, values = node_file("runs.states"), node_file("common.values")
SPEC = values.PolicySpec("a_run", 0, ModelConfig(), LoraConfig(), MemoryConfig())


@pytest.fixture
def store(tmp_path: Path) -> Any:
    return states.Store(tmp_path, SPEC)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write and every use has a time of its own, a second after the one before."""
    now = [1_000_000_000]
    real_utime, real_save = os.utime, states.save_checkpoint

    def utime(path: Path) -> None:
        now[0] += 1
        real_utime(path, (now[0], now[0]))

    def save(path: Path, *rest: Any) -> None:
        real_save(path, *rest)
        utime(path)

    monkeypatch.setattr(states.os, "utime", utime)
    monkeypatch.setattr(states, "save_checkpoint", save)


def state(*line: str) -> Any:
    """The state whose ancestors and itself are `line`."""
    history = [{"iteration": i + 1, "reward": 0.1 * i, "loss": 1.0} for i in range(len(line))]
    return states.State({"w": torch.tensor([float(len(line))])}, {"step": len(line)}, history, line)


def step(store: Any, *line: str) -> bool:
    """What a training node does; whether the run left another branch."""
    store.save(line[-1], state(*line))
    return store.follow(state(*line))


def test_a_state_comes_back_as_it_was_saved(store: Any) -> None:
    step(store, "a1", "a2")
    loaded = store.load("a2")
    assert loaded.step == 2
    assert loaded.tensors["w"].equal(torch.tensor([2.0]))
    assert list(loaded.history) == list(state("a1", "a2").history)
    assert list(loaded.line) == ["a1", "a2"]


def test_a_new_run_is_at_its_root(store: Any) -> None:
    assert store.newest() == 0
    assert store.at(0) == values.PolicyHandle(SPEC, 0, store.root)
    assert store.has(store.root)
    assert not store.has("a1")
    assert not store.folder.exists()


def test_the_run_goes_by_its_states_one_after_the_other(store: Any) -> None:
    assert [step(store, *["a1", "a2", "a3"][: n + 1]) for n in range(3)] == [False] * 3
    assert [store.at(n).state for n in range(4)] == [store.root, "a1", "a2", "a3"]
    assert [store.at(n).step for n in range(4)] == [0, 1, 2, 3]
    assert store.newest() == 3


def test_what_a_killed_process_left_half_written_goes_with_the_next_state(store: Any) -> None:
    store.folder.mkdir(parents=True)
    names = (".state_a0-01234567.tmp.safetensors", ".run-01234567.tmp.json", ".state_b0-01234567.tmp.safetensors")
    state, line, fresh = (store.folder / name for name in names)
    for path, age in ((state, 2 * states.WRITING_S), (line, 2 * states.WRITING_S), (fresh, 0)):
        path.touch()
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    step(store, "a1")
    assert not state.exists()
    assert not line.exists()
    assert fresh.exists()  # another process may be writing it


def test_another_branch_takes_the_place_of_the_later_steps(store: Any) -> None:
    step(store, "a1")
    step(store, "a1", "a2")
    step(store, "a1", "a2", "a3")
    assert step(store, "a1", "b2")
    assert [store.at(n).state for n in (1, 2)] == ["a1", "b2"]
    with pytest.raises(UserError, match="iteration 3 cannot follow"):
        store.at(3)
    assert store.has("a3")  # it is not deleted


def test_going_back_on_the_same_branch_keeps_what_comes_after(store: Any) -> None:
    for n in (1, 2, 3):
        step(store, *["a1", "a2", "a3"][:n])
    assert not store.follow(state("a1"))
    assert store.at(3).state == "a3"


def test_going_back_to_another_branch_brings_back_its_line(store: Any) -> None:
    step(store, "a1")
    step(store, "a1", "a2")
    step(store, "b1")
    assert store.follow(state("a1", "a2"))
    assert [store.at(n).state for n in (1, 2)] == ["a1", "a2"]


@pytest.mark.usefixtures("clock")
def test_only_the_states_used_last_stay(store: Any) -> None:
    line = [f"a{n}" for n in range(1, 9)]
    for n in range(1, 9):
        step(store, *line[:n])
    assert [key for key in line if store.has(key)] == line[-states.KEEP :]
    assert store.newest() == 8
    with pytest.raises(UserError) as error:
        store.at(2)
    assert str(error.value) == (
        "Run 'a_run' no longer has its state after 2 iterations, so iteration 2 cannot follow: set the iteration to 8,"
        " or to 0 to start anew."
    )


@pytest.mark.usefixtures("clock")
def test_a_state_that_is_used_again_outlives_the_others(store: Any) -> None:
    line = [f"a{n}" for n in range(1, states.KEEP + 1)]
    for n in range(1, states.KEEP + 1):
        step(store, *line[:n])
    store.follow(state("a1"))
    step(store, "a1", "b2")
    assert [store.has(key) for key in ("a1", "a2", "a3", "b2")] == [True, False, True, True]


def test_the_state_that_is_saved_is_never_the_one_to_go(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "_used", lambda path: 0.0)  # a file system whose clock is too coarse to tell
    for n in range(20):
        store.save(f"a{n}", state(f"a{n}"))
        assert store.has(f"a{n}")
    assert len(list(store.folder.glob("state_*"))) == states.KEEP


def test_too_far_is_told_in_one_sentence(store: Any) -> None:
    step(store, "a1")
    with pytest.raises(UserError) as error:
        store.at(7)
    assert str(error.value) == (
        "Run 'a_run' with these settings has made 1 iteration, so iteration 7 cannot follow: set the iteration to 1,"
        " or to 0 to start anew."
    )


def test_a_run_that_has_made_nothing_says_so(store: Any) -> None:
    with pytest.raises(
        UserError, match="has made 0 iterations, so iteration 1 cannot follow: set the iteration to 0.$"
    ):
        store.at(1)


def test_a_state_that_is_gone_is_told_in_one_sentence(store: Any) -> None:
    with pytest.raises(UserError, match="^Run 'a_run' no longer has the state that is asked for, only the 5 .*anew.$"):
        store.load("gone")


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_a_crash_between_writing_a_state_and_going_by_it_loses_nothing(store: Any) -> None:
    step(store, "a1")
    store.save("a2", state("a1", "a2"))  # and here the power goes
    again = states.Store(store.folder.parents[1], SPEC)
    assert again.at(1).state == "a1"
    assert again.newest() == 1
    assert again.has("a2")  # so the step is not taken again ...
    again.follow(again.load("a2"))
    assert again.at(2).state == "a2"  # ... but gone by


def test_a_crash_while_writing_leaves_the_run_as_it_was(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step(store, "a1")
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}

    def crash(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(UserError, match="no space left on device"):
        store.save("a2", state("a1", "a2"))
    with pytest.raises(UserError, match="no space left on device"):
        store.follow(state("b1"))
    assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == before


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"states": null}', '{"states": 3}', '{"spec": {}}', "\x00", "[" * 100_000, "9" * 5000]
)
def test_a_spoilt_line_starts_anew(store: Any, content: str) -> None:
    step(store, "a1")
    (store.folder / "run.json").write_text(content)
    assert store.newest() == 0
    assert not store.follow(state("a1"))
    assert store.at(1).state == "a1"


def test_a_line_without_its_files_starts_anew(store: Any) -> None:
    step(store, "a1")
    (store.folder / "state_a1.safetensors").unlink()
    assert store.newest() == 0
    with pytest.raises(UserError, match="set the iteration to 0.$"):
        store.at(1)


def test_a_damaged_state_is_told(store: Any) -> None:
    step(store, "a1")
    path = store.folder / "state_a1.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="is damaged"):
        store.load("a1")


def test_where_the_best_state_is_gone_or_damaged_the_nearest_one_is_found(store: Any) -> None:
    line = ("a1", "a2", "a3", "a4")
    for end in range(1, 5):
        step(store, *line[:end])
    store.folder.joinpath("state_a3.safetensors").write_bytes(b"damaged")
    assert store.nearest(line, 4)[0] == 4
    store.folder.joinpath("state_a4.safetensors").unlink()
    assert store.nearest(line, 4)[0] == 2
    for path in store.folder.glob("state_*"):
        path.unlink()
    assert store.nearest(line, 4) is None


def test_how_far_any_branch_has_come_is_known_without_loading_a_state(store: Any) -> None:
    assert store.furthest() == 0
    step(store, "a1", "a2", "a3")
    step(store, "b1")
    assert store.furthest() == 3
    store.folder.joinpath("state_a3.safetensors").write_bytes(b"damaged")
    assert store.furthest() == 1


@pytest.mark.parametrize("change", [{"line": None}, {"line": []}, {"history": 3}, {"trainer": {}}, {"trainer": 1}])
def test_a_state_whose_info_is_wrong_is_told(store: Any, change: dict[str, Any]) -> None:
    step(store, "a1")
    path = store.folder / "state_a1.safetensors"
    tensors, info = states.load_checkpoint(path)
    states.save_checkpoint(path, tensors, {**info, **change})
    with pytest.raises(UserError, match="damaged"):
        store.load("a1")


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "a_run").write_text("a file, not a folder")
    with pytest.raises(UserError, match="^Cannot make the folder .*: "):
        states.Store(tmp_path, SPEC).save("a1", state("a1"))


# --- roots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, seed=1),
        replace(SPEC, lora=LoraConfig(rank=4)),
        replace(SPEC, lora=LoraConfig(init="mine.safetensors")),
        replace(SPEC, model=ModelConfig(path="checkpoints/a/model.safetensors")),
        replace(SPEC, model=ModelConfig(dtype="float32")),
        replace(SPEC, model=ModelConfig(quantize="int8")),
    ],
)
def test_what_the_first_state_depends_on_makes_another_root(other: Any) -> None:
    assert states.root_key(other) != states.root_key(SPEC)


def test_models_of_one_name_in_two_folders_are_two() -> None:
    roots = {states.root_key(replace(SPEC, model=ModelConfig(path=f"checkpoints/{n}/model.safetensors"))) for n in "ab"}
    assert len(roots) == 2


@pytest.mark.parametrize(
    "other",
    [replace(SPEC, run="other"), replace(SPEC, memory=MemoryConfig(offload=False)),
     replace(SPEC, model=ModelConfig(device="cuda"))],
)  # fmt: skip
def test_where_and_how_it_runs_does_not_matter(other: Any) -> None:
    assert states.root_key(other) == states.root_key(SPEC)


def test_runs_and_roots_have_folders_of_their_own(tmp_path: Path) -> None:
    specs = [SPEC, replace(SPEC, run="other"), replace(SPEC, seed=1)]
    folders = [states.Store(tmp_path, spec).folder for spec in specs]
    assert len(set(folders)) == 3
    assert [folder.parents[1] for folder in folders] == [tmp_path] * 3
    step(states.Store(tmp_path, specs[0]), "a1")
    assert [states.Store(tmp_path, spec).newest() for spec in specs] == [1, 0, 0]
    spec = json.loads((folders[0] / "run.json").read_text())["spec"]
    assert (spec["run"], spec["model"]["path"]) == ("a_run", "embedded")
