"""`dgpo_core.evaluate` of several adapters: on the same noise, with intervals, in a table, a report and a picture."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from engine import write_quick
from PIL import Image
from safetensors.torch import load_file, save_file

from dgpo_core import evaluate, train
from dgpo_core.runs import assemble

pytestmark = pytest.mark.usefixtures("rewards")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(here: Path, model: Path, name: str, reward: str = "bright", **changes: object) -> str:
    """A short training's LoRA."""
    evaluation = {"final_images": 0, "every": 0}
    argv = write_quick(here, model, name=name, reward=reward, iterations=2, evaluation=evaluation, **changes)
    assert train.main(argv) == 0
    return f"runs/{name}/lora.safetensors"


def measured(here: Path, *argv: str) -> dict:
    """What the command finds, by the settings that the last training was started with."""
    assert evaluate.main(["--config", "quick.yaml", *argv, "--images", "6", "--json", "found.json"]) == 0
    return json.loads((here / "found.json").read_text())


def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks of the models that are loaded from here on."""
    real, found = assemble.load_model, []

    def load_model(config: object, world: object) -> object:
        found.append(config.lora.rank)
        return real(config, world)

    monkeypatch.setattr(assemble, "load_model", load_model)
    return found


@pytest.mark.slow
def test_several_adapters_and_rewards_give_one_table(
    here: Path, sd3_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = trained(here, sd3_folder, "a")
    b = trained(here, sd3_folder, "b", seed=1)
    c = trained(here, sd3_folder, "c", lora={"rank": 2, "alpha": 8.0})
    ranks = loads(monkeypatch)
    found = measured(here, "--lora", a, b, c, "--reward", "bright", "red,edge_density", "--report", "out")
    assert ranks == [4, 2]  # once for a and b, whose branches are alike, and once for c
    rows = {(row["model"], row["reward"]): row for row in found["table"]}
    assert list(rows) == [(m, r) for r in ("bright", "red", "edge_density") for m in ("base", "a", "b", "c")]
    for (model, reward), row in rows.items():
        if model == "base":
            assert "gain" not in row
            continue
        assert row["gain"] == pytest.approx(row["mean"] - rows["base", reward]["mean"], abs=1e-6)
        low, high = row["gain_ci95"]
        assert low <= row["gain"] <= high
    # paired: the images are alike, so the gain is known much better than either mean
    row = rows["a", "bright"]
    assert row["gain_ci95"][1] - row["gain_ci95"][0] < 0.5 * (row["ci95"][1] - row["ci95"][0])
    told = capsys.readouterr().out
    assert told.count("95 % interval") == 6
    _check_report(here / "out", rows)
    # each alone is what it is among others
    for model, path in (("b", b), ("c", c)):
        alone = measured(here, "--lora", path, "--reward", "bright")
        assert alone["adapter"]["mean"] == pytest.approx(rows[model, "bright"]["mean"], abs=1e-6)
        assert alone["base"]["mean"] == pytest.approx(rows["base", "bright"]["mean"], abs=1e-6)


def _check_report(folder: Path, rows: dict) -> None:
    text = (folder / "report.md").read_text()
    assert "![The same prompts and seeds side by side](report.png)" in text
    assert text.count("| base |") == 3
    gain = rows["b", "red"]["gain"]
    assert re.search(rf"## red\n(.|\n)*\| b \| .*\| {re.escape(f'{gain:+.3f}')} \|", text)
    sheet = Image.open(folder / "report.png").convert("RGB")
    assert len(sheet.getcolors(2**24)) > 50
    assert sheet.width > sheet.height  # four blocks beside each other, two prompts under each other


@pytest.mark.slow
def test_an_adapter_called_as_the_base_is_told_apart_from_it(here: Path, sd3_folder: Path) -> None:
    found = measured(here, "--lora", trained(here, sd3_folder, "base"), "--reward", "bright")
    assert [row["model"] for row in found["table"]] == ["base", "base (1)"]


@pytest.mark.slow
def test_prompts_in_the_settings_are_named_as_such(
    here: Path, sd3_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = trained(here, sd3_folder, "a", data={"held_out": "embedded", "held_out_text": "blue"})
    measured(here, "--lora", lora, "--reward", "bright", "--report", "out")
    assert "prompts  in the settings" in capsys.readouterr().out
    assert "of the prompts in the settings" in (here / "out/report.md").read_text()


@pytest.mark.parametrize("option", ["--lora", "--reward"])
def test_a_list_that_is_given_twice_is_told(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([option, "a", "--images", "4", option, "b"]) == 2
    assert f"{option} is given 2 times" in capsys.readouterr().err


@pytest.mark.slow
def test_without_rewards_named_it_measures_what_the_files_were_trained_on(here: Path, sd3_folder: Path) -> None:
    a, b = trained(here, sd3_folder, "a"), trained(here, sd3_folder, "b", reward="red")
    argv = ["--lora", a, b, "--model", str(sd3_folder), "--prompts", "held_out.txt", "--images", "6"]
    assert evaluate.main([*argv, "--json", "found.json"]) == 0
    found = json.loads((here / "found.json").read_text())
    assert [row["reward"] for row in found["table"]] == ["bright"] * 3 + ["red"] * 3
    assert found["reward"] == "bright"


@pytest.mark.slow
def test_an_adapter_of_another_base_is_told(here: Path, sd3_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = trained(here, sd3_folder, "a"), trained(here, tiny.folder("sd15"), "b")
    capsys.readouterr()
    assert evaluate.main(["--lora", a, b, "--report", "out"]) == 2
    told = capsys.readouterr().err
    assert told == (
        "error: runs/b/lora.safetensors was trained on sd15, runs/a/lora.safetensors on sd3: compare adapters of one"
        " base model, or give --model.\n"
    )
    assert not (here / "out").exists()
    by_force = ["--model", str(sd3_folder), "--prompts", "held_out.txt", "--images", "2"]
    assert evaluate.main(["--lora", b, a, *by_force]) == 2
    assert "is for another model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_lora_of_somebody_else_needs_model_prompts_and_reward(
    here: Path, sd3_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = trained(here, sd3_folder, "a")
    save_file(load_file(ours), "plain.safetensors")
    capsys.readouterr()
    assert evaluate.main(["--lora", "plain.safetensors"]) == 2
    assert "give --model, --prompts and --reward" in capsys.readouterr().err
    both = measured(here, "--lora", ours, "plain.safetensors")
    a, plain = (row for row in both["table"] if row["model"] != "base")
    assert plain["mean"] == pytest.approx(a["mean"], abs=1e-5)
    more = ["--model", str(sd3_folder), "--prompts", "held_out.txt", "--reward", "bright", "--steps", "3", "--cfg", "1"]
    alone = measured(here, "--lora", "plain.safetensors", *more)
    assert alone["adapter"]["n"] == 6
    assert torch.isfinite(torch.tensor(alone["adapter"]["mean"]))
