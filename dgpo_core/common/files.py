"""Writing a file whole or not at all, under a name that every system takes."""

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from dgpo_core.common.errors import UserError

TEMPORARY = ".tmp"
"""Suffix of files that are being written; one that is left over belongs to a killed process and means nothing."""


def write_atomic(path: str | Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Writes `path` so that it holds, at every moment, either what it held before or all of `content`.

    `content` is the data, or a function that writes them to the path it is given (in the same folder, with the same
    suffix). On failure nothing is left behind; what the system refused (permission, a full disk) raises UserError.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the data before the name: a crash must not leave a name without data
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"Cannot write {path}: {reason(error)}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_writable(path: str | Path) -> None:
    """Raises UserError where `write_atomic` could not write `path`, for those who compute for hours before it; leaves
    what is there."""
    path = Path(path)
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise UserError(f"Cannot write {path}: it is a folder.")
    try:
        _try_to_write(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"Cannot write {path}: {reason(error)}.") from error


def require_place_for(folder: Path) -> None:
    """Raises UserError where a folder could not be made, or nothing written into it; makes nothing."""
    there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    try:
        _try_to_write(there / "new")
    except OSError as error:
        raise UserError(f"Cannot make the folder {folder}: {reason(error)}.") from error


def _try_to_write(path: Path) -> None:
    """Makes and removes a file of another name in the same folder."""
    probe = _beside(path)
    try:
        probe.touch()
    finally:
        with contextlib.suppress(OSError, ValueError):
            probe.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A name that nothing has, in the same folder, with the same suffix."""
    return path.with_name(f".{path.stem}-{secrets.token_hex(4)}{TEMPORARY}{path.suffix}")


def reason(error: Exception) -> str:
    """What the system said was wrong, as the end of a sentence."""
    text = getattr(error, "strerror", None) or str(error)
    return text[:1].lower() + text[1:].rstrip(".")


def check_folder_name(name: str, what: str = "run name") -> None:
    """Raises UserError for a name that cannot be a folder's on every system; an empty one is none yet."""
    device = name.partition(".")[0].rstrip(" ").upper() in _DEVICES
    if device or set('/\\:*?"<>|') & set(name) or not name.isprintable() or name.strip(" .") != name:
        why = "it is the name of a device on Windows" if device else "use letters, digits, '-', '_' and '.'"
        raise UserError(f"The {what} {name[:60]!r} cannot be a folder name: {why}.")
    if len(name.encode(errors="replace")) > LONGEST_NAME:
        raise UserError(f"The {what} {name[:60]!r} is too long: at most {LONGEST_NAME} bytes.")


LONGEST_NAME = 200  # bytes; file systems take 255
_PORTS = [f"{port}{number}" for port in ("COM", "LPT") for number in range(10)]
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *_PORTS}
