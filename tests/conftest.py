"""What all tests share: nothing is downloaded, nothing opens a window, and a config that is quick to spell."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

from dataclasses import replace
from pathlib import Path

import pytest

from dgpo_core.config import Config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The default settings of a run called `test` in a folder of the test's own."""
    return replace(Config(), name="test", output=str(tmp_path / "runs"))
