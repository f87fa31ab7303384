"""Prompts on disk: read by the text encoders once, and the same ever after."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import single_file
import tiny
import torch
from engine import write_quick
from safetensors.torch import load_file

from dgpo_core import train
from dgpo_core.common.errors import UserError
from dgpo_core.policy import FAMILIES, load_policy
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.policy.prompt_cache import PromptCache, identity, users_folder

pytestmark = pytest.mark.slow

TENSORS = {"tokens": torch.randn(1, 3, 4).bfloat16(), "pooled": torch.zeros(1, 4)}


def cache(folder: Path, model: str = "a", most: int = 2**30) -> PromptCache:
    return PromptCache(folder, model, most)


def load(path: Path, folder: Path, **options: Any) -> DiffusersPolicy:
    return load_policy(path, rank=2, prompt_cache=folder, **options)


def same(policy: DiffusersPolicy, other: DiffusersPolicy) -> bool:
    """Whether both read prompts alike, bit for bit."""
    pairs = zip(policy.encode(["", *tiny.PROMPTS]), other.encode(["", *tiny.PROMPTS]), strict=True)
    return all(
        cond.tensors.keys() == known.tensors.keys()
        and all(torch.equal(tensor, known.tensors[name]) for name, tensor in cond.tensors.items())
        for cond, known in pairs
    )


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that goes through a text encoder."""
    seen: list[str] = []
    for cls in FAMILIES.values():

        def read(self: DiffusersPolicy, text: str, own: Callable[..., Any] = cls._encode) -> Any:
            seen.append(text)
            return own(self, text)

        monkeypatch.setattr(cls, "_encode", read)
    return seen


# --- files -----------------------------------------------------------------------------------------------------------


def test_what_is_kept_comes_back_bit_for_bit(tmp_path: Path) -> None:
    cache(tmp_path).write("red", TENSORS)
    found = cache(tmp_path).read("red")
    assert found is not None
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


def test_another_text_or_model_finds_nothing(tmp_path: Path) -> None:
    cache(tmp_path).write("red", TENSORS)
    assert not cache(tmp_path).has("blue")
    assert cache(tmp_path).read("blue") is None
    assert cache(tmp_path, "b").read("red") is None


def test_no_prompt_is_kept_in_words(tmp_path: Path) -> None:
    cache(tmp_path).write("a secret", TENSORS)
    (file,) = tmp_path.iterdir()
    assert b"secret" not in file.read_bytes() + file.name.encode()


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "text", "folder"])
def test_what_is_damaged_is_not_there_and_is_written_anew(damage: str, tmp_path: Path) -> None:
    cache(tmp_path).write("red", TENSORS)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    changed = content[:-1] + bytes([content[-1] ^ 1])
    spoiled = {"cut": content[:-9], "empty": b"", "changed": changed, "text": b"x" * 99}
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(spoiled[damage])
    assert cache(tmp_path).read("red") is None
    if damage != "folder":
        cache(tmp_path).write("red", TENSORS)
        assert cache(tmp_path).read("red") is not None


def test_what_was_not_used_for_longest_makes_room_and_files_of_others_stay(tmp_path: Path) -> None:
    cache(tmp_path / "one").write("a", TENSORS)
    (file,) = (tmp_path / "one").iterdir()
    most = int(4.5 * file.stat().st_size)
    kept = cache(tmp_path, most=most)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2 * most)
    for i, text in enumerate("abcdef"):
        before = set(tmp_path.iterdir())
        kept.write(text, TENSORS)
        (new,) = set(tmp_path.iterdir()) - before
        os.utime(new, (i, i))
    assert kept.read("a")  # used now
    kept.make_room()
    there = [text for text in "abcdef" if kept.has(text)]
    assert "a" in there
    assert "f" in there
    assert "b" not in there
    assert sum(path.stat().st_size for path in tmp_path.glob("dgpo-*")) <= most
    assert (tmp_path / "model.safetensors").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"set\s+memory\.prompt_cache to another one, or memory\.prompt_cache_gib to 0"):
        cache(tmp_path / "file" / "prompts")


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    kept = cache(tmp_path / "prompts")
    shutil.rmtree(tmp_path / "prompts")
    kept.write("red", TENSORS)
    kept.make_room()
    assert kept.read("red") is None


def test_the_users_folder_is_what_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGPO_CACHE", str(tmp_path))
    assert users_folder() == tmp_path / "prompts"
    assert cache(Path("auto")).folder == tmp_path / "prompts"
    monkeypatch.delenv("DGPO_CACHE")
    assert users_folder().parts[-2:] == ("dgpo", "prompts")


def test_a_models_name_follows_its_files_wherever_they_lie(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(tiny.folder("sd3"), folder)
    files = sorted((folder / "text_encoder").iterdir())
    name = identity(files)
    folder.rename(tmp_path / "b")
    moved = [tmp_path / "b" / file.relative_to(folder) for file in files]
    assert identity(moved) == name
    assert identity(moved, "int8") != name
    weights = next(file for file in moved if file.suffix == ".safetensors")
    about, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert identity(moved) != name


# --- a policy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_policy_reads_no_prompt_and_loads_no_text_encoder(
    family: str, tmp_path: Path, readings: list[str]
) -> None:
    first = load(tiny.folder(family), tmp_path)
    assert same(first, tiny.shared(family))
    readings.clear()
    second = load(tiny.folder(family), tmp_path)
    assert second.is_encoded(["", *tiny.PROMPTS])
    assert same(second, first)
    assert readings == []
    assert not second._text_encoders()


def test_one_prompt_more_brings_the_text_encoders(tmp_path: Path, readings: list[str]) -> None:
    load(tiny.folder("sd3"), tmp_path).encode(tiny.PROMPTS)
    readings.clear()
    policy = load(tiny.folder("sd3"), tmp_path)
    assert not policy.is_encoded(["green"])
    policy.encode([*tiny.PROMPTS, "green"])
    assert readings == ["green"]
    assert all(not parameter.requires_grad for encoder in policy._text_encoders() for parameter in encoder.parameters())


def test_a_single_file_and_its_folder_read_alike_and_late(tmp_path: Path, readings: list[str]) -> None:
    path = single_file.write(tiny.sd15(tmp_path), tmp_path / "model.safetensors")
    policy = load(path, tmp_path / "prompts", config=tiny.folder("sd15"))
    assert not policy._text_encoders()
    assert same(policy, tiny.shared("sd15"))
    readings.clear()
    assert same(load(path, tmp_path / "prompts", config=tiny.folder("sd15")), policy)
    assert readings == []


def test_quantised_readers_and_other_number_types_have_prompts_of_their_own(
    tmp_path: Path, readings: list[str]
) -> None:
    for options in ({}, {"quantize_text": "int8"}, {"dtype": "bf16"}):
        readings.clear()
        load(tiny.folder("sd3"), tmp_path, **options).encode(["red"])
        assert readings == ["red"]
    policy = load(tiny.folder("sd3"), tmp_path, quantize_text="int8")
    assert same(policy, load_policy(tiny.folder("sd3"), rank=2, quantize_text="int8"))


def test_reading_ahead_lets_go_of_the_text_encoders(tmp_path: Path, readings: list[str]) -> None:
    policy = load(tiny.folder("sd3"), tmp_path)
    policy.read_ahead([*tiny.PROMPTS, "", *tiny.PROMPTS], lambda: None)
    assert readings == [*tiny.PROMPTS, ""]
    assert not policy._text_encoders()
    assert same(policy, tiny.shared("sd3"))
    assert not policy._text_encoders()


def test_reading_ahead_stops_where_the_cache_is_full(tmp_path: Path, readings: list[str], monkeypatch: Any) -> None:
    from dgpo_core.policy import pipeline

    monkeypatch.setattr(pipeline, "_AHEAD", 1)
    policy = load(tiny.folder("sd3"), tmp_path, prompt_cache_bytes=1)
    policy.read_ahead(tiny.PROMPTS, lambda: None)
    assert readings == tiny.PROMPTS[:1]
    assert policy._text_encoders()


def test_reading_ahead_can_be_stopped(tmp_path: Path, readings: list[str]) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(tiny.folder("sd3"), tmp_path).read_ahead(tiny.PROMPTS, stop)
    assert readings == []


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("rewards")
def test_a_second_run_reads_nothing_and_learns_the_same(here: Path, sd3_folder: Path, readings: list[str]) -> None:
    argv = [*write_quick(here, sd3_folder), "--memory.prompt_cache", "prompts"]
    assert train.main([*argv, "--name", "first"]) == 0
    assert sorted(readings) == sorted(set(readings))
    assert readings
    readings.clear()
    assert train.main([*argv, "--name", "second"]) == 0
    assert readings == []
    assert train.main([*argv, "--name", "without", "--memory.prompt_cache_gib", "0"]) == 0
    assert readings
    first, *others = (load_file(here / f"runs/{name}/lora.safetensors") for name in ("first", "second", "without"))
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)
