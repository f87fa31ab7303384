"""Threads that wait for each other: commands of ours soon let them sleep, other programs are left alone."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import pytest

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def after_import(arguments: Sequence[str], given: Mapping[str, str], before: str = "") -> dict[str, str]:
    """What of the environment a fresh interpreter has once it has imported the package, started with `arguments`."""
    program = f"import json, os, sys; sys.orig_argv = {list(arguments)!r}\n{before}\nimport dgpo_core\n"
    program += f"print(json.dumps({{name: os.environ[name] for name in {NAMES!r} if name in os.environ}}))"
    rest = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**rest, **given}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("arguments", [["python", "-m", "dgpo_core.train"], ["python", "-u", "-m", "dgpo_core.bench"]])
def test_a_commands_threads_soon_sleep(arguments: list[str]) -> None:
    assert after_import(arguments, {}) == {"GOMP_SPINCOUNT": "1000"}


@pytest.mark.parametrize("arguments", [["python", "main.py"], ["python", "-m", "pytest"], ["python", "-m"]])
def test_another_programs_environment_stays(arguments: list[str]) -> None:
    assert after_import(arguments, {}) == {}


@pytest.mark.parametrize("given", [{"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_who_has_chosen_keeps_the_choice(given: dict[str, str]) -> None:
    assert after_import(["python", "-m", "dgpo_core.train"], given) == given


def test_nothing_is_set_where_it_would_come_too_late() -> None:
    late = "import types; sys.modules['torch'] = types.ModuleType('torch')"
    assert after_import(["python", "-m", "dgpo_core.train"], {}, late) == {}
