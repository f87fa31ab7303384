"""Reading settings is quick: it needs no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import dgpo_core

READING = """
import sys
from dgpo_core.settings.presets import load_preset, preset_names
from dgpo_core.settings.validation import validate
from dgpo_core.settings.yaml_file import to_yaml
for name in preset_names():
    to_yaml(load_preset(name))
validate(load_preset("quickstart"))
print(sorted({"torch", "diffusers", "peft", "transformers"} & set(sys.modules)))
"""


@pytest.mark.processes
def test_presets_are_read_and_checked_without_importing_torch() -> None:
    root = str(Path(dgpo_core.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", READING], env={"PYTHONPATH": root}, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.strip() == "[]", ran.stderr
