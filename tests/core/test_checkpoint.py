from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dgpo_core.common.errors import UserError
from dgpo_core.runs.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)


def _save(folder: Path, step: int, **info: object) -> Path:
    path = checkpoint_path(folder, step)
    save_checkpoint(path, {"current/weight": torch.full((3,), float(step))}, {"step": step, **info})
    return path


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.randn(4, 5)
    tensors = {
        "float": torch.tensor([0.1, float("nan"), -0.0]),
        "bfloat": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(3.5),
        "state": torch.get_rng_state(),
        "int": torch.tensor([2**62]),
        "bool": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "transposed": shared.T,
        "view": shared[1:],
    }
    info = {"step": 3, "loss": 0.1 + 0.2, "nested": {"list": [1, "zwölf", None]}}
    save_checkpoint(tmp_path / "step_000003.safetensors", tensors, info)
    loaded, loaded_info = load_checkpoint(tmp_path / "step_000003.safetensors")
    assert loaded_info == info
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        same_bits = loaded[name].reshape(-1).view(torch.uint8) == tensor.reshape(-1).view(torch.uint8)
        assert same_bits.all()


def test_a_loaded_tensor_does_not_hang_on_the_file(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    tensors, _ = load_checkpoint(path)
    tensors["current/weight"] += 1
    again, _ = load_checkpoint(path)
    assert again["current/weight"].tolist() == [1.0, 1.0, 1.0]


def test_latest_is_the_newest_that_is_whole(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    whole = _save(tmp_path, 9)
    truncated = _save(tmp_path, 10)
    truncated.write_bytes(truncated.read_bytes()[:-5])
    checkpoint_path(tmp_path, 11).write_bytes(b"")
    save_file({"weight": torch.zeros(2)}, checkpoint_path(tmp_path, 12))  # not one of ours
    (tmp_path / ".step_000013-abc.tmp.safetensors").write_bytes(whole.read_bytes())
    (tmp_path / "step_latest.safetensors").write_bytes(whole.read_bytes())
    assert latest_checkpoint(tmp_path) == whole
    assert latest_checkpoint(tmp_path) != _save(tmp_path, 1_000_000)
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1_000_000)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04K\x01.", b"\xff" * 64])
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step_000001.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)


def test_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not a checkpoint of DGPO"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="There is no checkpoint"):
        load_checkpoint(tmp_path / "step_000002.safetensors")


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, 1, fingerprint="abc")
    assert load_checkpoint(path, "abc")[1]["fingerprint"] == "abc"
    with pytest.raises(UserError, match="other settings"):
        load_checkpoint(path, "def")


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    paths = [_save(tmp_path, step) for step in (5, 10, 999_999, 1_000_000)]
    prune_checkpoints(paths[-1], keep=2)
    assert sorted(tmp_path.iterdir()) == sorted(paths[2:])
    prune_checkpoints(paths[-1], keep=5)
    assert sorted(tmp_path.iterdir()) == sorted(paths[2:])


def test_prune_never_takes_the_one_just_written_for_a_damaged_later_one(tmp_path: Path) -> None:
    paths = [_save(tmp_path, step) for step in (10, 12, 20)]
    paths[2].write_bytes(b"")
    prune_checkpoints(paths[1], keep=1)
    assert sorted(tmp_path.iterdir()) == sorted(paths[1:])


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _save(tmp_path, 1)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="no space left on device"):
        save_checkpoint(path, {"other": torch.ones(5)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
