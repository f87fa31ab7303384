"""Checkpoints for tests: a tiny SD1.5 in one file, with changes, and folders of tiny models with changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import single_file
import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

CASES = Path(__file__).parents[1] / "cases" / "models"


def tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a tiny SD1.5 under the names of a single checkpoint."""
    return load_file(single_file.write(tiny.sd15(folder), folder / "plain.safetensors"))


def write(path: Path, state: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> Path:
    """A checkpoint with the configs of the tiny SD1.5 beside it."""
    save_file(dict(state), path, metadata=dict(header or {}))
    shutil.copytree(tiny.folder("sd15"), path.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    return path


def copy(family: str, to: Path, scheduler: Mapping[str, Any] | None = None) -> Path:
    """A tiny model's folder, with another scheduler config where one is given."""
    shutil.copytree(tiny.folder(family), to)
    if scheduler is not None:
        (to / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return to


def change(folder: Path, component: str, change: Any) -> None:
    """Replaces a component's weights by what `change` makes of them; change(state) -> state."""
    (path,) = (folder / component).glob("*.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
