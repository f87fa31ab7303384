"""What all tests share: nothing is downloaded, nothing opens a window, one thread, and a tiny model made once."""

import atexit
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

import pytest
import torch

from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.settings.config import Config

atexit.register(shutil.rmtree, os.environ["DGPO_CACHE"], ignore_errors=True)
pytest_plugins = ("comfy_fixtures",)
IN_COMFYUI = Path(__file__).parent / "comfy"
BROWSERS = {"browser", "chromium", "_chromium"}  # fixtures
QUICK = ("sd15", "sd3")
"""What every family promises is asked of a UNet and a transformer while one works, of the others with what is slow."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is in tests/comfy, what uses a browser, and what is asked of other families than `QUICK` as of these;
    skips what needs a GPU where there is none."""
    for item in items:
        if IN_COMFYUI in item.path.parents:
            item.add_marker("comfy")
        if BROWSERS & set(getattr(item, "fixturenames", ())):
            item.add_marker("browser")
        family = _family(item)
        if family and family not in QUICK:
            item.add_marker("slow")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="There is no CUDA device."))


def _family(item: pytest.Item) -> str:
    """That a test is asked of besides those of `QUICK`; empty where it is about particular ones."""
    asked = [mark.args[1] for mark in item.iter_markers("parametrize") if mark.args and mark.args[0] == "family"]
    if not asked or not set(QUICK) <= {str(one) for one in asked[0]}:
        return ""
    return str(item.callspec.params["family"])  # type: ignore[attr-defined]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The default settings of a run called `test` in a folder of the test's own."""
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
