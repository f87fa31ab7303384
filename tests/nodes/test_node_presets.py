"""The presets as values of Training Settings' widgets; no ComfyUI."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from dgpo_core.comfy.forms import as_setting
from dgpo_core.settings.config import AUTO, Config, TrainingConfig
from dgpo_core.settings.presets import MODES, apply_mode, load_preset, preset_names
from dgpo_core.settings.values import read_settings

MODE_NAMES = [f"mode {mode}" for mode in MODES]


@pytest.fixture(scope="module")
def presets() -> ModuleType:
    """`nodes/common/presets.py`, without the package, which needs ComfyUI."""
    path = Path(__file__).parents[2] / "nodes" / "common" / "presets.py"
    spec = importlib.util.spec_from_file_location("dgpo_node_presets", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_preset_and_every_mode_is_there(presets: ModuleType) -> None:
    assert list(presets.preset_values()) == [*preset_names(), *MODE_NAMES]


@pytest.mark.slow
@pytest.mark.parametrize("name", preset_names())
def test_the_values_of_a_preset_are_the_engine_s(presets: ModuleType, name: str) -> None:
    values = json.loads(json.dumps(presets.preset_values()))[name]
    chosen = load_preset(name)
    assert values.pop("combine") == chosen.combine
    micro_batch = as_setting(values.pop("micro_batch"), AUTO)  # as the node reads its widget
    assert read_settings(TrainingConfig, {**values, "micro_batch": micro_batch}) == chosen.training


@pytest.mark.parametrize("mode", MODES)
def test_the_values_of_a_mode_are_the_engine_s(presets: ModuleType, mode: str) -> None:
    values = json.loads(json.dumps(presets.preset_values()))[f"mode {mode}"]
    assert "combine" not in values  # which modes leave to its widget
    micro_batch = as_setting(values.pop("micro_batch"), AUTO)
    assert read_settings(TrainingConfig, {**values, "micro_batch": micro_batch}) == apply_mode(Config(), mode).training


def test_lists_are_texts(presets: ModuleType) -> None:
    assert presets.preset_values()["quickstart"]["betas"] == "0.9, 0.99"
    assert presets.preset_values()["mode 1"]["betas"] == "0.9, 0.999"
