"""The benchmark's models of real size: they are what was published, and the benchmark runs on them."""

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from counted_models import SMALL
from torch import nn

from dgpo_core.bench import main
from dgpo_core.benchmark.random_model import RANDOM_MODELS, random_policy


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the backbones of the random models small; all else stays as it is."""
    for name, build in list(RANDOM_MODELS.items()):
        monkeypatch.setitem(RANDOM_MODELS, name, functools.partial(build, **SMALL[name]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "encoders"),
    [
        ("sd15", {"text_encoder": 123_060_480}),
        ("sd21", {"text_encoder": 340_387_840}),
        ("sdxl", {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840}),
        ("flux", {"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656}),
        ("zimage", {"text_encoder": 4_022_468_096}),
        ("qwenimage", {"text_encoder": 8_292_166_656}),
        ("qwen-image-edit", {"text_encoder": 8_292_166_656}),
        ("chroma", {"text_encoder": 4_762_310_656}),
        ("flux2-klein", {"text_encoder": 4_022_468_096}),
        ("sana", {"text_encoder": 2_614_341_888}),
        ("hidream", {"text_encoder_3": 4_762_310_656, "text_encoder_4": 8_030_261_248}),
        ("wan", {"text_encoder": 5_680_910_336}),
    ],
)
def test_without_storage_the_text_encoders_are_whole_too(name: str, encoders: dict[str, int]) -> None:
    tiny.require(name)
    pipe = RANDOM_MODELS[name](torch.bfloat16, "meta")
    assert {part: parameters(getattr(pipe, part)) for part in encoders} == encoders


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backbone", "vae"),
    [
        ("sd35m", 2_243_171_520, 83_819_683),
        ("sdxl", 2_567_463_684, 83_653_863),
        ("flux", 11_901_408_320, 83_819_683),
        ("sd15", 859_520_964, 83_653_863),
        ("sd21", 865_910_724, 83_653_863),
        ("zimage", 6_154_908_736, 83_819_683),
        ("qwenimage", 20_430_401_088, 126_892_531),
        ("qwen-image-edit", 20_430_401_088, 126_892_531),
        ("chroma", 8_899_983_424, 83_819_683),
        ("flux2-klein", 3_875_544_576, 84_046_115),
        ("sana", 1_604_462_752, 312_250_275),
        ("hidream", 17_105_733_184, 83_819_683),
        ("wan", 1_418_996_800, 126_892_531),
        ("wan-14b", 14_288_491_584, 126_892_531),
    ],
)
def test_backbone_and_vae_have_as_many_parameters_as_the_published_ones(name: str, backbone: int, vae: int) -> None:
    tiny.require(name)
    pipe = RANDOM_MODELS[name](torch.bfloat16, "meta")
    network = pipe.unet if name in ("sd15", "sd21", "sdxl") else pipe.transformer
    assert parameters(network) == backbone
    assert parameters(pipe.vae) == vae
    kept = {torch.float32} if name.startswith("wan") else set()  # by its class, as when it is loaded
    assert {p.dtype for module in (network, pipe.vae) for p in module.parameters()} == {torch.bfloat16, *kept}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokens", "beside"),
    [
        ("sd35m", (1, 77 + 128, 4096), {"pooled": (1, 2048)}),
        ("sdxl", (1, 77, 2048), {"pooled": (1, 1280)}),
        ("flux", (1, 512, 4096), {"pooled": (1, 768)}),
        ("zimage", (1, 27, 2560), {"mask": (1, 27)}),  # as many as it has, in letters here
        ("qwenimage", (1, 27, 3584), {"mask": (1, 27)}),
        ("qwen-image-edit", (1, 27, 3584), {"mask": (1, 27)}),  # without its picture
        ("chroma", (1, 13, 4096), {"mask": (1, 13)}),
        ("flux2-klein", (1, 512, 7680), {}),  # with what fills it up
        ("sana", (1, 8, 2304), {"mask": (1, 8)}),  # without the instruction
        ("hidream", (1, 128, 4096), {"layers": (1, 32, 128, 4096), "pooled": (1, 2048)}),
        ("wan", (1, 512, 4096), {}),
    ],
)
@pytest.mark.usefixtures("small")
def test_prompts_are_encoded_to_the_real_widths_and_token_counts(
    name: str, tokens: tuple[int, ...], beside: dict[str, tuple[int, ...]]
) -> None:
    tiny.require(name)
    setup = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": None, "seed": 0, "offload": True}
    policy = random_policy(name, dtype="float32", device=torch.device("cpu"), **setup)
    one, other = policy.encode(["a red circle", "two blue squares"])
    assert {key: tensor.shape for key, tensor in one.tensors.items()} == {"tokens": tokens, **beside}
    assert not torch.equal(one.tensors["tokens"], other.tensors["tokens"])


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM_MODELS)
@pytest.mark.usefixtures("small")
def test_the_benchmark_runs_on_a_random_model_and_its_numbers_are_finite(name: str, tmp_path: Path) -> None:
    tiny.require(name)
    file = tmp_path / "bench.json"
    options = ["--height", "32", "--width", "32", "--groups", "1", "--group_size", "2", "--iterations", "1"]
    assert main(["--random", name, *options, "--device", "cpu", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    model = {"name": f"{name} (random weights)", "dtype": "float32", "device": "cpu", "height": 32, "width": 32}
    assert found["model"] == model
    assert found["informative"] == 1  # otherwise no update was timed
    assert found["phases"].keys() == {"encode", "rollout", "reward", "update"}
    assert all(math.isfinite(number) for number in numbers(found))


@pytest.mark.slow
def test_a_preset_without_prompts_is_timed_on_a_model_from_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny.folder("sd3"))
    options = ["--height", "32", "--width", "32", "--groups", "1", "--group_size", "2", "--iterations", "1"]
    assert main(["--preset", "sd35m-pickscore-safe", "--model", folder, *options, "--device", "cpu", "--busy"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["name"] == folder
    assert found["busy"]["ratio"] == pytest.approx(found["busy"]["busy"] / found["busy"]["quiet"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell that a parent has ended; ten minutes do")
def test_what_takes_a_core_ends_with_the_process_that_started_it() -> None:
    program = "import subprocess, sys, os, time; from dgpo_core.bench import BUSY\n"
    program += "print(subprocess.Popen([sys.executable, '-c', BUSY, str(os.getpid())]).pid, flush=True); time.sleep(99)"
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, 0)  # raises where there is none
    parent.kill()
    parent.communicate(timeout=60)  # the pipe ends once the child, too, has let go of it


def numbers(values: dict[str, Any]) -> Iterator[float]:
    for value in values.values():
        if isinstance(value, dict):
            yield from numbers(value)
        elif not isinstance(value, str):
            yield value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--random", "sd35"], ["sd35", "did you mean sd35m?"]),
        (["--random", "sdxl", "--model", "somewhere"], ["--model", "--random"]),
        (["--random", "sdxl", "--group_size", "1"], ["group_size", "at least 2"]),
    ],
)
def test_a_benchmark_that_cannot_be_ends_with_exit_code_2_and_one_sentence(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--device", "cpu"]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ")
    assert "\n" not in told
    assert all(word in told for word in words)
