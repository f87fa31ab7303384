"""`python -m dgpo_core.fit`: what it says fits, does; what it cannot count, it says in one sentence."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from counted_models import SMALL

from dgpo_core.benchmark.advice import GIB, RESERVE
from dgpo_core.benchmark.cards import CARDS, find_card, seconds
from dgpo_core.benchmark.count import Kernel
from dgpo_core.benchmark.random_model import RANDOM_MODELS
from dgpo_core.fit import main
from dgpo_core.policy.loading.header import read_header

pytestmark = pytest.mark.slow

FEW = ["--data.groups_per_iteration", "1", "--rollout.group_size", "4", "--model.height", "32", "--model.width", "32"]


def fit(arguments: list[str], folder: Path) -> Mapping[str, Any]:
    file = folder / "fit.json"
    assert main([*arguments, "--json", str(file)]) == 0
    found: Mapping[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("family", [*tiny.BUILDERS, *tiny.EDITORS])
def test_a_diffusers_folder_is_counted_by_its_configs(family: str, tmp_path: Path) -> None:
    folder = tiny.folder(family)
    found = fit(["--model", str(folder), *FEW], tmp_path)
    files = [read_header(file) for file in folder.glob("vae/*.safetensors")]
    assert found["model"] == str(folder)
    assert (found["height"], found["width"]) == (32, 32)
    assert found["phases"]["update"]["flops"] > 0
    vae = sum(tensor.numel for header in files for tensor in header.tensors.values())
    # the quickstart is in float32; FLUX.2's has a counter of 8 bytes
    assert found["phases"]["decode"]["by_kind"]["VAE"] == pytest.approx(4 * vae, abs=4)


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_a_published_architecture_is_counted_without_any_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.require(name)
    monkeypatch.setitem(RANDOM_MODELS, name, functools.partial(RANDOM_MODELS[name], **SMALL[name]))
    found = fit(["--random", name, "--card", "RTX 4090", *FEW], tmp_path)
    assert found["seconds"]["update"] > 0
    assert found["hours"] > 0
    assert found["phases"]["encode"]["bytes"] > found["phases"]["encode"]["by_kind"]["text encoders"] > 2e8


def test_what_is_said_to_fit_fits_when_it_is_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(tiny.folder("sdxl")), *FEW, "--memory.no_gradient_checkpointing"]
    batches = ["--rollout.batch", "4", "--training.micro_batch", "4", "--evaluation.batch", "4"]
    whole = fit([*model, *batches], tmp_path)
    vram = ["--vram", str((0.8 * whole["peak"]["bytes"] + RESERVE) / GIB)]
    capsys.readouterr()
    found = fit([*model, *batches, *vram], tmp_path)
    said = capsys.readouterr().out
    assert not found["fits"]
    assert found["fits_after_changes"]
    assert all(f"--{change['setting']}" in said and change["saves"] > 0 for change in found["changes"])
    changed = [text for change in found["changes"] for text in _option(change["setting"], change["value"])]
    assert fit([*model, *batches, *changed, *vram], tmp_path)["fits"]


CARD = ["--card", "RTX 4090", *FEW, "--iterations", "100"]


def test_a_run_without_evaluations_can_be_counted_and_one_that_is_measured_at_its_ends_takes_longer(
    tmp_path: Path,
) -> None:
    none = fit([*CARD, "--evaluation.images", "0", "--evaluation.final_images", "0"], tmp_path)
    ends = fit([*CARD, "--evaluation.images", "0", "--evaluation.final_images", "512"], tmp_path)
    assert none["seconds"]["evaluation"] == ends["seconds"]["evaluation"] == 0
    looks = fit([*CARD, "--evaluation.every", "0", "--evaluation.images", "512"], tmp_path)["seconds"]["evaluation"]
    assert (ends["hours"] - none["hours"]) * 3600 == pytest.approx(2 * looks)


def test_the_largest_evaluation_is_the_one_that_must_fit(tmp_path: Path) -> None:
    few, many = (
        fit([*FEW, "--evaluation.batch", "0", "--evaluation.images", "4", "--evaluation.final_images", n], tmp_path)
        for n in ("4", "400")
    )
    assert many["peak"]["bytes"] > 4 * few["peak"]["bytes"]


def test_what_is_counted_before_a_change_takes_its_own_seconds(tmp_path: Path) -> None:
    """An evaluation in smaller batches than were counted was taken for as many times as long."""
    large = [*CARD, "--evaluation.batch", "64", "--model.quantize", "none", "--memory.offload"]
    free = fit(large, tmp_path)
    tight = fit([*large, "--vram", str((0.8 * free["peak"]["bytes"] + RESERVE) / GIB)], tmp_path)
    assert "evaluation.batch" in [change["setting"] for change in tight["changes"]]
    assert tight["seconds"] == pytest.approx(free["seconds"])


def _option(setting: str, value: object) -> list[str]:
    return [f"--{setting}"] if value is True else [f"--{setting}", str(value)]


def test_what_does_not_fit_at_its_smallest_says_how_much_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fit(["--model", str(tiny.folder("sd3")), *FEW, "--vram", "0.8"], tmp_path)
    said = capsys.readouterr().out
    assert not found["fits_after_changes"]
    assert "does not fit even at its smallest" in said
    assert "RTX 3060" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--card", "RTX 4091"], ["RTX 4091", "RTX 3060", "did you mean RTX 4090?"]),
        (["--random", "sdx"], ["sdx", "sd15, sd21, sd35m, sdxl, flux"]),
        (["--preset", "sdxl-pick"], ["sdxl-pick", "sdxl-pickscore"]),
        (["--model", "nowhere"], ["nowhere", "--random"]),
        (["--model", "a", "--random", "sdxl"], ["--model", "--random", "one of them"]),
        (["--vram", "-1"], ["vram", "at least 0"]),
        (["--rollout.batches", "1"], ["--rollout.batches", "did you mean --rollout.batch?"]),
        (["--model.height", "33"], ["model.height", "multiple of 8"]),
    ],
)
def test_what_cannot_be_counted_ends_with_exit_code_2_and_one_sentence(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ")
    assert "\n" not in told
    assert all(word in told for word in words)


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "4090", "NVIDIA GeForce RTX 4090"])
def test_a_card_is_found_however_its_name_is_written(name: str) -> None:
    assert find_card(name) is CARDS["RTX 4090"]


def test_work_takes_as_long_as_what_holds_it_up_most() -> None:
    card = CARDS["RTX 4090"]
    product, copy = Kernel(10**13, 10**8, 16), Kernel(0, 10**10, 16)
    assert seconds({product: 1}, card) == pytest.approx(10**13 / (0.4 * 165.2e12))
    assert seconds({copy: 1}, card) == pytest.approx(10**10 / (0.7 * 1008e9))
    assert seconds({Kernel(10**13, 10**8, 32): 1}, card) > seconds({product: 1}, card)
    assert seconds({Kernel(0, 4, 16): 1000}, card) == pytest.approx(1000 * 35e-6)
    over_the_bus = Kernel(0, 2 * 10**10, 16, crosses=True)  # read there and written here
    assert seconds({over_the_bus: 1}, card) == pytest.approx(10**10 / (0.7 * 31.5e9))
    assert seconds({over_the_bus: 1, product: 4}, card) == pytest.approx(4 * seconds({product: 1}, card))
