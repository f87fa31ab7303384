"""One safetensors file per checkpoint: whole or absent, checked when read, never unpickled.

Tensors are flat (`current/...`, `optimizer/...`: the trainer chooses the prefixes); the rest is JSON in the header.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dgpo_core.common.digest import digest_of
from dgpo_core.common.errors import UserError
from dgpo_core.common.files import write_atomic
from dgpo_core.common.reading import parse_json, require_ordinary, shown

FORMAT = "dgpo-checkpoint-1"
_NAME = re.compile(r"step_(\d{6,15})\.safetensors")


def checkpoint_path(folder: str | Path, step: int) -> Path:
    """Where the checkpoint after optimiser step `step` lies, such as `folder/step_000010.safetensors`."""
    return Path(folder) / f"step_{step:06d}.safetensors"


def best_checkpoint(folder: str | Path) -> Path:
    """Where the checkpoint of the best evaluation so far lies: never pruned, and never what a run goes on from."""
    return Path(folder) / "best.safetensors"


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes `tensors` (any shape, type and device) and `info` (JSON; floats survive bit for bit), atomically.

    `info` should hold `step` and, for `load_checkpoint` to compare, the run's `fingerprint`. Raises UserError if the
    file cannot be written; the checkpoints before it stay as they are.
    """
    flat = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "info": json.dumps(info), "digest": digest_of(flat)}
    write_atomic(path, lambda temporary: save_file(flat, temporary, metadata))


def load_checkpoint(path: str | Path, fingerprint: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU, and the info, as they were saved.

    Raises UserError if the file is missing, damaged or no checkpoint of ours, or if it was written under settings with
    another `fingerprint`.
    """
    path = Path(path)
    require_ordinary(path, "The checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is not a checkpoint of DGPO: give one from a run's folder checkpoints/.")
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}  # else views of the file
        info = parse_json(metadata["info"], f"The info of the checkpoint {path}")
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint {path}.") from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"The checkpoint {path} is damaged ({shown(error)}): {_ADVICE}") from None
    if not isinstance(info, dict):
        raise UserError(f"The checkpoint {path} is damaged (its info is no object): {_ADVICE}")
    if metadata.get("digest") != digest_of(tensors):
        raise UserError(f"The checkpoint {path} is damaged (its checksum does not match): {_ADVICE}")
    if fingerprint is not None and info.get("fingerprint") != fingerprint:
        raise UserError(f"The checkpoint {path} is from a run with other settings: give one of this run.")
    return tensors, info


def read_info(path: str | Path) -> dict[str, Any]:
    """A checkpoint's info alone, without reading its tensors. Raises UserError as `load_checkpoint`, but for damage
    behind the header, which is not looked at."""
    require_ordinary(path, "The checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            info = parse_json((file.metadata() or {})["info"], f"The info of the checkpoint {path}")
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"The checkpoint {path} is damaged ({shown(error)}): {_ADVICE}") from None
    if not isinstance(info, dict):
        raise UserError(f"The checkpoint {path} is damaged (its info is no object): {_ADVICE}")
    return info


_ADVICE = "delete it to go on from the one before."


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint in `folder` whose header can be read and matches the length of the file, or None."""
    for path in reversed(checkpoints(folder)):
        try:
            require_ordinary(path, "The checkpoint")
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") == FORMAT:
                    return path
        except (OSError, SafetensorError, UserError):
            continue
    return None


def prune_checkpoints(newest: Path, keep: int) -> None:
    """Deletes all that are older than the last `keep` up to `newest`, the one just written: later ones are damaged, as
    a run that goes on has tried them first, and are not to be counted."""
    older = [path for path in checkpoints(newest.parent) if step_of(path) <= step_of(newest)]
    for path in older[:-keep]:
        with contextlib.suppress(OSError):  # one that cannot go does no harm
            path.unlink()


def checkpoints(folder: str | Path) -> list[Path]:
    """All but the best one, oldest first; some may be damaged."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The optimiser step that a checkpoint's name tells."""
    match = _NAME.fullmatch(path.name)
    if not match:
        raise ValueError(f"{path.name} is no checkpoint's name")
    return int(match[1])
