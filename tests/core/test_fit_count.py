"""What is counted without weights is what the same iteration takes with them."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import pytest
import tiny
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from dgpo_core.benchmark.count import Ledger, Phase
from dgpo_core.benchmark.iteration import PHASES, count_iteration, count_without_weights
from dgpo_core.policy.families import FAMILIES
from dgpo_core.policy.loading.libraries import quiet
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.settings.config import Config
from dgpo_core.settings.values import from_dict

pytestmark = pytest.mark.slow

SIZE = (tiny.SIZE, tiny.SIZE)
SETTINGS = engine.quick(
    rollout={"cfg": 4.5, "batch": 4}, training={"micro_batch": 2, "clip": 0.01}, evaluation={"batch": 4, "cfg": 4.5}
)


class OffTheDevice:
    """Makes pictures ready for a text encoder as where that is on another device: of this only what it then gets is
    counted, and not the work before."""

    def __init__(self, processor: Callable[..., Any]) -> None:
        self.processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            found = self.processor(*args, **kwargs)
        found.data = {name: tensor.clone() for name, tensor in found.data.items()}
        return found


def policy(
    family: str, device: str, dtype: torch.dtype, checkpointing: bool, dropout: float = 0.0, quantize: str = "none"
) -> DiffusersPolicy:
    with quiet(), tempfile.TemporaryDirectory() as folder:
        pipe = tiny.build(family, Path(folder))
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.to(device=device, dtype=dtype)
        if device == "cpu" and hasattr(pipe, "processor"):
            pipe.processor = OffTheDevice(pipe.processor)
        lora = {"rank": 2, "alpha": 4.0, "dropout": dropout, "targets": None, "seed": 0, "quantize": quantize}
        made = FAMILIES[family](pipe, dtype=dtype, device=torch.device(device), **lora)
    if checkpointing:
        made.enable_gradient_checkpointing()
    return made


def really(family: str, dtype: torch.dtype, checkpointing: bool, config: Config = SETTINGS) -> dict[str, Phase]:
    """What the iteration takes when it is run on the processor."""
    return count_iteration(policy(family, "cpu", dtype, checkpointing), config, SIZE, Ledger(torch.device("cpu")))


def counted(family: str, dtype: torch.dtype, checkpointing: bool, config: Config = SETTINGS) -> dict[str, Phase]:
    return count_without_weights(policy(family, "meta", dtype, checkpointing), config, SIZE, like="cpu")


KEPT, RECOMPUTED = False, True
# Each family in both number types and both ways, and those that are quickest to run in all four pairs
PAIRS = [
    pytest.param(family, dtype, way, id=f"{family}-{str(dtype)[6:]}-{'recomputed' if way else 'kept'}")
    for family in (*tiny.BUILDERS, *tiny.EDITORS)
    for dtype in (torch.float32, torch.bfloat16)
    for way in (KEPT, RECOMPUTED)
    if family in ("sd15", "sd3") or (dtype == torch.float32) == (way == RECOMPUTED)
]


@pytest.mark.parametrize(("family", "dtype", "checkpointing"), PAIRS)
def test_the_count_is_what_the_iteration_takes_when_it_is_run(
    family: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    real, found = really(family, dtype, checkpointing), counted(family, dtype, checkpointing)
    for name in PHASES:
        assert found[name].bytes == pytest.approx(real[name].bytes, rel=0.1), name
        assert found[name].flops == real[name].flops > 0, name
        assert (found[name].forwards, found[name].backwards) == (real[name].forwards, real[name].backwards), name


@pytest.mark.parametrize("family", ["sd3", "qwenimage"])
def test_a_quantised_base_is_counted_as_it_is_kept(family: str) -> None:
    how = {"dtype": torch.bfloat16, "checkpointing": True, "quantize": "int8"}
    real = count_iteration(policy(family, "cpu", **how), SETTINGS, SIZE, Ledger(torch.device("cpu")))
    found = count_without_weights(policy(family, "meta", **how), SETTINGS, SIZE, like="cpu")
    for name in PHASES:
        assert found[name].bytes == pytest.approx(real[name].bytes, rel=0.1), name
        assert found[name].flops == real[name].flops, name
    assert found["update"].peak["base"] < counted(family, torch.bfloat16, RECOMPUTED)["update"].peak["base"]


@pytest.mark.parametrize("family", ["flux2", "qwen-image-edit"])
def test_pictures_that_prompts_bring_are_counted(family: str, tmp_path: Path) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text(json.dumps({"prompt": "red", "images": ["a.png", "b.png"]}))
    for name in ("a.png", "b.png"):
        Image.new("RGB", SIZE).save(tmp_path / name)
    config = from_dict({"data": {"prompts": str(file)}}, SETTINGS)
    real, found = really(family, torch.float32, KEPT, config), counted(family, torch.float32, KEPT, config)
    alone = counted(family, torch.float32, KEPT)
    for name in PHASES:
        assert found[name].bytes == pytest.approx(real[name].bytes, rel=0.1), name
        assert found[name].flops == real[name].flops, name
    assert found["draw"].flops > 1.3 * alone["draw"].flops


def test_the_longest_prompt_is_counted_by_models_that_take_a_text_as_it_is() -> None:
    family = "qwenimage"
    config = from_dict({"data": {"text": "red\n" + "red blue " * 20 + "\nblue"}}, SETTINGS)
    real, found = really(family, torch.float32, KEPT, config), counted(family, torch.float32, KEPT, config)
    short = counted(family, torch.float32, KEPT, from_dict({"data": {"text": "red"}}, SETTINGS))
    for name in PHASES:
        assert found[name].bytes == pytest.approx(real[name].bytes, rel=0.1), name
        assert found[name].flops == real[name].flops, name
    assert found["update"].flops > 1.1 * short["update"].flops
    assert found["update"].peak["activations"] > short["update"].peak["activations"]


@pytest.mark.parametrize("solver", ["ddim", "plms", "dpmpp_2m", "unipc"])
def test_every_solver_of_noise_models_can_be_counted(solver: str) -> None:
    config = engine.quick(rollout={"solver": solver, "steps": 4}, evaluation={"steps": 4})
    assert counted("sd15", torch.float32, False, config)["draw"].forwards > 0


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "unipc"])
def test_every_solver_of_flow_models_can_be_counted(solver: str) -> None:
    config = engine.quick(rollout={"solver": solver, "steps": 4}, evaluation={"steps": 4})
    assert counted("flux", torch.float32, False, config)["draw"].forwards > 0


def test_images_that_go_forth_and_back_are_numbered_as_the_settings_say() -> None:
    found = counted("sd3", torch.float32, False)
    samples, levels = 2 * 4, 2
    assert found["draw"].forwards == samples * 3 * 2  # steps, and the two branches of guidance
    assert found["update"].backwards == samples * levels
    assert found["update"].forwards == samples * levels * 4  # base, old policy, error beforehand, trained forward


def test_recomputing_takes_less_memory_and_more_operations() -> None:
    kept, recomputed = (counted("sdxl", torch.float32, on)["update"] for on in (False, True))
    assert recomputed.bytes < kept.bytes
    assert recomputed.flops > kept.flops


def test_every_byte_has_a_kind() -> None:
    found = counted("sdxl", torch.float32, False)
    made = policy("sdxl", "meta", torch.float32, False)
    adapters = sum(p.nbytes for name in ("current", "old", "ema") for p in made.adapter_state(name).values())
    update = found["update"].peak
    assert update["adapters"] == adapters
    assert update["VAE"] == sum(p.nbytes for p in (*made.pipe.vae.parameters(), *made.pipe.vae.buffers()))
    assert update["optimiser"] == pytest.approx(adapters, rel=0.05)  # a gradient and two moments
