"""Native training of models of real size on a GPU: needs a ComfyUI, as `tests/comfy` does, and no network.

`COMFYUI_FLAGS= pytest tests/gpu/test_native.py`: without its `--cpu`, which the tests give it elsewhere.
"""

from pathlib import Path
from typing import Any

import pytest
from comfy_server import FLAGS, run_script, why_not

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).with_name("native_sizes.py")


@pytest.fixture(scope="module", params=[(), ("--dynamic",)], ids=["loaded", "dynamic VRAM"])
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    if why_not() or "--cpu" in FLAGS:
        pytest.skip(why_not() or "COMFYUI_FLAGS is not set: ComfyUI would take the CPU.")
    return run_script(SCRIPT, 1200, *request.param)


@pytest.mark.parametrize("model", ["sd15", "sdxl", "zimage", "flux"])
def test_a_model_of_real_size_trains_whether_it_fits_or_not(found: dict[str, Any], model: str) -> None:
    if model not in found:
        pytest.skip(f"This ComfyUI does not know {model}.")
    assert "failed" not in found[model], found[model]
    assert 0 < found[model]["trained"]["grad_norm"] < float("inf")
    for way in ("checkpointing", "kept"):
        one = found[model][way]
        assert one["size"] > 0
        assert one["differs"] < 0.01  # sums of 16-bit numbers in another order
        assert one["whole"]["beside"] < one["whole"]["reserved"]
        if not found["dynamic"]:  # else ComfyUI gives back what is not used at the moment
            assert one["partly"]["weights"] < 0.8 * one["partly"]["of"]
