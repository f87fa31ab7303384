"""What all tests share: nothing is downloaded, nothing opens a window, one thread, and a tiny model made once.

torch and the engine are imported where they are used: with several processes the first only hands out tests.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny models, threads cost more than they bring
os.environ["DGPO_CACHE"] = tempfile.mkdtemp(prefix="dgpo-cache-")  # not the folder of whoever runs the tests

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dgpo_core.policy.pipeline import DiffusersPolicy
    from dgpo_core.settings.config import Config

gc.disable()  # until all tests are imported
atexit.register(shutil.rmtree, os.environ["DGPO_CACHE"], ignore_errors=True)
pytest_plugins = ("comfy_fixtures",)
IN_COMFYUI = Path(__file__).parent / "comfy"
BROWSERS, SERVERS = {"browser", "chromium", "_chromium"}, {"_comfyui"}  # fixtures
QUICK = ("sd15", "sd3")
"""What every family promises is asked of a UNet and a transformer while one works, of the others with what is slow."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is in tests/comfy, and as slow what uses a browser or a ComfyUI, or is asked of other families than
    `QUICK` as of these; skips what needs a GPU where there is none."""
    for item in items:
        if IN_COMFYUI in item.path.parents:
            item.add_marker("comfy")
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & BROWSERS:
            item.add_marker("browser")
        if fixtures & (BROWSERS | SERVERS) or _family(item) not in ("", *QUICK):
            item.add_marker("slow")
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="There is no CUDA device."))


def pytest_collection_finish() -> None:
    """Looks for garbage from here on, but not among what is imported by now: a tenth of the quick tests' time."""
    gc.enable()
    gc.freeze()


@functools.cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _family(item: pytest.Item) -> str:
    """That a test is asked of besides those of `QUICK`; empty where it is about particular ones."""
    for mark in item.iter_markers("parametrize"):
        if set(QUICK) <= {one for one in mark.args[1] if isinstance(one, str)}:
            return str(item.callspec.params[mark.args[0]])  # type: ignore[attr-defined]
    return ""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The default settings of a run called `test` in a folder of the test's own."""
    from dgpo_core.settings.config import Config

    return replace(Config(), name="test", output=str(tmp_path / "runs"))


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 with random weights, in diffusers format."""
    import tiny

    return tiny.save("sd3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def _loaded(sd3_folder: Path) -> DiffusersPolicy:
    from dgpo_core.policy import load_policy

    return load_policy(sd3_folder, rank=4, alpha=8.0)


@pytest.fixture
def policy(_loaded: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch) -> Iterator[DiffusersPolicy]:
    """The tiny SD3 with adapters as fresh and with no prompt encoded; whatever a test does to it is undone."""
    states = {name: _loaded.adapter_state(name) for name in ("current", "old", "ema")}
    before = {name: {key: p.detach().clone() for key, p in state.items()} for name, state in states.items()}
    monkeypatch.setattr(_loaded, "_conds", {})
    yield _loaded
    for name, state in states.items():
        for key, parameter in state.items():
            parameter.data.copy_(before[name][key])
            parameter.grad = None


@pytest.fixture
def rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the rewards of `bright.py` known by name."""
    import bright

    bright.register(monkeypatch.setitem)
