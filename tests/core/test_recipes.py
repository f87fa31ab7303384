"""The settings for who says only what to teach, and to which model."""

from __future__ import annotations

from pathlib import Path

import pytest
import single_file
import tiny

from dgpo_core.common.errors import UserError
from dgpo_core.policy import FAMILIES, family_of
from dgpo_core.settings.config import EMBEDDED
from dgpo_core.settings.presets import load_preset
from dgpo_core.settings.recipes import PRESETS, kind_in_comfyui, recipe
from dgpo_core.settings.shipped import EDITOR
from dgpo_core.settings.validation import check_ranges, check_timesteps


def test_every_family_has_a_recipe_that_can_work() -> None:
    assert set(PRESETS) == {EMBEDDED, EDITOR, *FAMILIES}
    for kind in [*PRESETS, "Chroma"]:
        for people in (False, True):
            found = recipe(kind, people)
            check_timesteps(found.rollout, found.training)
            for settings in (found.rollout, found.training, found.lora, found.data):
                check_ranges(settings)


def test_the_embedded_model_with_a_reward_is_the_quickstart() -> None:
    assert recipe(EMBEDDED, people=False) == load_preset("quickstart")


def test_what_a_person_says_of_a_group_is_compared_within_it() -> None:
    assert {recipe(kind, people=True).training.advantage_std for kind in PRESETS} == {"group"}
    assert recipe("sdxl", people=False).training.advantage_std == "global"


def test_the_average_follows_in_a_training_of_some_minutes() -> None:
    assert {recipe(kind, people).training.ema_slow_every for kind in PRESETS for people in (True, False)} == {1}


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_a_folders_family_is_told_without_its_weights(family: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text((tiny.folder(family) / "model_index.json").read_text("utf-8"), "utf-8")
    assert family_of(tmp_path) == family


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("SD15", "sd15"), ("SD20", "sd15"), ("SDXL", "sdxl"), ("Segmind_Vega", "sdxl"), ("SD3", "sd3"),
        ("Flux", "flux"), ("FluxSchnell", "flux"), ("Flux2", "flux2"), ("ZImage", "zimage"), ("QwenImage", "qwenimage"),
        ("Chroma", "chroma"), ("HiDream", "hidream"), ("WAN21_T2V", "wan"), ("WAN22_T2V", "wan"),
        ("Lumina2", "Lumina2"),
    ],
)  # fmt: skip
def test_a_model_of_comfyui_has_its_own_familys_recipe(name: str, kind: str) -> None:
    assert kind_in_comfyui(name) == kind


def test_a_files_family_is_told_by_its_header(tmp_path: Path) -> None:
    assert family_of(single_file.write(tiny.sd15(tmp_path / "pipe"), tmp_path / "model.safetensors")) == "sd15"
    (tmp_path / "other.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="is not a checkpoint of any of the families"):
        family_of(tmp_path / "other.safetensors")
