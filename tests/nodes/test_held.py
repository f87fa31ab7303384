"""What a process tells of its runs: how often one left a branch or lost its folder, and how many states were kept."""

from pathlib import Path

import pytest
from node_files import node_file

from dgpo_core.settings.config import LoraConfig, MemoryConfig, ModelConfig

Held = node_file("runs.held").Held
values = node_file("common.values")


def handle(state: str = "a", run: str = "a_run") -> values.PolicyHandle:
    return values.PolicyHandle(values.PolicySpec(run, 0, ModelConfig(), LoraConfig(), MemoryConfig()), 1, state)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run that has a state."""
    folder = tmp_path / "a_run" / "root"
    folder.mkdir(parents=True)
    return folder


def test_a_state_counts_once_however_often_it_is_kept_and_again_where_a_run_comes_back_to_it(folder: Path) -> None:
    held = Held()
    for state in ("a", "a", "b", "b", "a"):
        held.note_kept(handle(state), folder, turned=False)
    assert (held.steps_kept(), held.turns("a_run"), held.turns(None)) == (3, 0, 0)


def test_a_run_that_leaves_a_branch_turns_and_no_other_does(folder: Path) -> None:
    held = Held()
    held.note_kept(handle(), folder, turned=True)
    held.note_kept(handle(), folder, turned=True)
    assert (held.turns("a_run"), held.turns("another"), held.turns(None)) == (2, 0, 2)


def test_a_lost_folder_counts_once_however_often_is_asked(folder: Path) -> None:
    held = Held()
    held.note_kept(handle(), folder, turned=False)
    folder.rmdir()
    assert [held.turns("a_run") for _ in range(3)] == [1, 1, 1]
    assert held.turns(None) == 1


@pytest.mark.parametrize("asked", [False, True])
def test_a_folder_that_is_made_anew_was_lost_all_the_same(folder: Path, asked: bool) -> None:
    held = Held()
    held.note_kept(handle(), folder, turned=False)
    folder.rmdir()
    if asked:
        held.turns("a_run")
    held.note_writing(folder)
    folder.mkdir()
    held.note_kept(handle("b"), folder, turned=False)
    held.note_writing(folder)
    assert (held.turns("a_run"), held.steps_kept()) == (1, 2)
