"""One real ComfyUI with this pack, and one browser, for all tests that do not need their own."""

from collections.abc import Iterator
from typing import Any

import pytest
from comfy_browser import Browser, why_no_browser
from comfy_server import REPO, ComfyServer, run_script, why_not

INSIDE = REPO / "tests" / "comfy" / "inside"


def seen_by(script: str, timeout: float) -> Any:
    """A fixture: what a script of tests/comfy/inside saw, for all tests of the module that it stands in."""

    @pytest.fixture(scope="module")
    def found() -> Any:
        if why_not():
            pytest.skip(why_not())
        return run_script(INSIDE / script, timeout=timeout)

    return found


@pytest.fixture(scope="session")
def _comfyui() -> None:
    """Skips where no ComfyUI can be run."""
    if why_not():
        pytest.skip(why_not())


@pytest.fixture(scope="session")
def comfy(_comfyui: None) -> Iterator[ComfyServer]:
    """A server that all tests share: leave it running and its queue empty."""
    with ComfyServer() as server:
        yield server


@pytest.fixture(scope="session")
def small_comfy(_comfyui: None) -> Iterator[ComfyServer]:
    """Another one, which has all models of the native workflows under their names, small and random."""
    with ComfyServer({"dgpo": REPO, "small_models": INSIDE.parent / "packs" / "small_models"}) as server:
        run_script(INSIDE / "comfy_small_models.py", timeout=600, MODELS=str(server.base / "models"))
        yield server


@pytest.fixture(scope="session")
def _chromium(_comfyui: None) -> Iterator[Browser]:
    if why_no_browser():
        pytest.skip(why_no_browser())
    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(_chromium: Browser, comfy: ComfyServer) -> Browser:
    """The front end of the shared server, opened anew with an empty graph."""
    _chromium.open(comfy)
    return _chromium
