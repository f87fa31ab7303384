"""The suite for a new GPU: its commands are ones that the commands take, and its table says what they said."""

from pathlib import Path

import pytest

from dgpo_core import bench, fit
from dgpo_core.benchmark import suite
from dgpo_core.benchmark.suite import CASES, Case
from dgpo_core.common.errors import UserError
from dgpo_core.settings.command_line import parse

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_commands_of_a_case_mean_the_same_settings(case: Case, tmp_path: Path) -> None:
    timed = case.timed("cpu", tmp_path / "a.json")
    options = parse(bench.BenchConfig, timed[timed.index("dgpo_core.bench") + 1 :], "bench")
    counted = case.counted(tmp_path / "b.json")
    asked = fit.read(counted[counted.index("dgpo_core.fit") + 1 :])
    ours, theirs = bench.settings(options), asked.settings
    assert asked.random == options.random == case.model
    assert ours.rollout == theirs.rollout
    assert ours.memory.gradient_checkpointing == theirs.memory.gradient_checkpointing == case.checkpointing
    assert ours.training.micro_batch == theirs.training.micro_batch == case.images
    assert ours.data.groups_per_iteration == theirs.data.groups_per_iteration == 1


def test_a_file_that_cannot_be_written_is_told_before_the_minutes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        suite.report("no device", tmp_path / "nowhere" / "suite.json")


def test_what_failed_stands_in_the_table_beside_what_did_not() -> None:
    found = {
        "quickstart": {"base": {"mean": 0.45}, "adapter": {"mean": 0.984}, "seconds": 49.0},
        "cases": {
            "a": {
                "seconds_per_iteration": 2.0, "phases": {"rollout": 1.5, "update": 0.4}, "peak_memory_gib": 10.0,
                "fit": 9.5,
            },
            "b": {"failed": "out of memory", "fit": None},
        },
    }  # fmt: skip
    assert suite.table(found).splitlines() == [
        "Quickstart: held-out success 0.450 to 0.984 in 49 s.",
        "",
        "| case | iteration | rollout | update | peak | counted | off |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| a | 2.00 s | 1.50 s | 0.40 s | 10.0 GiB | 9.5 GiB | -5% |",
        "| b | out of memory | | | | | |",
    ]


@pytest.mark.processes
def test_the_suite_runs_to_its_end_though_a_case_cannot() -> None:
    short = ["--iterations", "1", "--evaluation.every", "0", "--evaluation.final_images", "10"]
    short += ["--data.groups_per_iteration", "1", "--rollout.group_size", "4"]
    found = suite.run("cpu", [Case("no such model", 1, False)], short)
    assert 0 <= found["quickstart"]["adapter"]["mean"] <= 1
    assert "There is no random model" in found["cases"]["no such model, 1 images, without"]["failed"]
    assert "no random model" in suite.table(found)
