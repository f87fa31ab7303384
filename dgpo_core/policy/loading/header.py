"""The header of a .safetensors file: names, number types and shapes of its tensors, and what its writer says of it.

Nothing but the header is read, so that the kind of a 20 GB file is known in a moment. The header comes from whoever
made the file: it is read within bounds, and what is no .safetensors file is called what it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import reason
from dgpo_core.common.reading import parse_json, shown

SUFFIXES = (".safetensors", ".sft")
_MOST_BYTES = 100_000_000  # the safetensors library's own limit
_BITS = {
    64: ("F64", "I64", "U64", "C64"),
    32: ("F32", "I32", "U32"),
    16: ("F16", "BF16", "I16", "U16"),
    8: ("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    6: ("F6_E2M3", "F6_E3M2"),
    4: ("F4",),
}
_BITS_OF = {name: bits for bits, names in _BITS.items() for name in names}
_BEGINNINGS = (  # of files that are something else
    (b"GGUF", "is a GGUF file, which is read as a model to train and under a name that ends in .gguf"),
    (b"PK\x03\x04", "is a pickle (.ckpt, .pt, .bin), which can run code: convert it to .safetensors"),
    (b"\x80", "is a pickle (.ckpt, .pt, .bin), which can run code: convert it to .safetensors"),
    (b"version https://git-lfs", "is a Git LFS pointer in place of the model: fetch it with `git lfs pull`"),
    (b"<", "is a web page in place of the model: download it again"),
)


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it; dtype: safetensors' name of it, such as F16, BF16, F8_E4M3."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file says of itself; tensors: by name, in the file's order."""

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, Entry]


def read_header(path: str | Path) -> Header:
    """The header of a .safetensors (or .sft) file. Raises UserError for anything else, and for one that is damaged."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            begin = file.read(64)
            _refuse_others(path, begin)
            size, length = file.seek(0, 2), int.from_bytes(begin[:8], "little")
            file.seek(8)
            text = b"" if length > min(_MOST_BYTES, size - 8) else file.read(length)
    except OSError as error:
        raise UserError(f"The model {shown(path)} cannot be read: {reason(error)}.") from None
    if not text:
        raise _damaged(path, "it ends within its header")
    table = parse_json(text, f"The header of the model {shown(path)}")
    if not isinstance(table, dict):
        raise _damaged(path, "its header is no table of tensors")
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise _damaged(path, "its metadata is no table")
    tensors = {name: _entry(path, name, entry, size - 8 - length) for name, entry in table.items()}
    return Header(path, {key: str(value) for key, value in metadata.items()}, tensors)


def _refuse_others(path: Path, begin: bytes) -> None:
    """Raises UserError for a file that is none of safetensors, by its first bytes or by its name."""
    for mark, what in _BEGINNINGS:
        if begin.startswith(mark) and begin[8:9] != b"{":  # a header's length may have any first byte
            raise UserError(f"The model {shown(path)} {what}.")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{shown(path)} is no .safetensors file: only those are loaded (pickles can run code), so convert it."
        )


def _entry(path: Path, name: str, entry: Any, data: int) -> Entry:
    """One tensor of the header; data: bytes that follow it in the file."""
    dtype, shape, offsets = (
        (entry.get(key) for key in ("dtype", "shape", "data_offsets")) if isinstance(entry, dict) else (None,) * 3
    )
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"its header does not describe {shown(name, 80)}")
    if dtype not in _BITS_OF:
        raise _damaged(path, f"{shown(name, 80)} has the unknown number type {shown(dtype, 20)}")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * _BITS_OF[dtype]:
        raise _damaged(path, f"{shown(name, 80)} has not as many bytes as its shape asks for")
    if end > data:
        raise _damaged(path, "it ends too early")
    return Entry(dtype, tuple(shape))


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether this is a list of whole numbers from 0 on."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{shown(path)} is not a readable .safetensors file ({what}): download it again.")
