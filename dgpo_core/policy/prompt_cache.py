"""Prompts that text encoders have read, on disk: they are read once for a model, not once for a run.

One safetensors file a prompt, named by what reads it and by the text, so that a folder of them can be shared by any
number of runs and processes. No prompt is in it in words. What is damaged counts as not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dgpo_core.common.digest import digest_of
from dgpo_core.common.errors import UserError
from dgpo_core.common.files import write_atomic
from dgpo_core.common.reading import shown

AUTO = "auto"
_OURS = "dgpo-prompt-"  # nothing else in the folder is ever deleted
_SAMPLES, _SAMPLE = 16, 2**16  # places in a file that are looked at, and bytes of each
_ROOM = 0.9  # of what is allowed is left after files were deleted: else every prompt would delete one


def users_folder() -> Path:
    """Where such files are kept if nobody says otherwise: in the folder that the environment variable DGPO_CACHE names,
    else in the user's for what can be made again."""
    if os.environ.get("DGPO_CACHE"):
        root = Path(os.environ["DGPO_CACHE"])
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local", "dgpo")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dgpo")
    return root / "prompts"


def identity(files: Iterable[Path], *more: str) -> str:
    """A name for what reads prompts: of its files, wherever they lie, and of all else that an embedding depends on.

    A file counts by its name, length, time and some of its bytes: reading gigabytes would take as long as loading them.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in more:
        digest.update(f"{part}\0".encode())
    for path in sorted(files):
        about = path.stat()
        digest.update(f"{path.parent.name}/{path.name}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
        with open(path, "rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(0, about.st_size - _SAMPLE) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


class PromptCache:
    """The embeddings of one model in a folder that may hold those of others.

    folder: `users_folder()` for "auto". model: its `identity`. most: bytes that all files in the folder take; those
    that were used last stay. Raises UserError where a folder that was named cannot be made.
    """

    def __init__(self, folder: str | Path, model: str, most: int) -> None:
        self.folder = users_folder() if str(folder) == AUTO else Path(folder)
        self.model, self.most = model, most
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            if str(folder) != AUTO:
                raise UserError(
                    f"The folder {shown(folder)} for encoded prompts cannot be made ({error.strerror}): set"
                    " memory.prompt_cache to another one, or memory.prompt_cache_gib to 0."
                ) from None

    def has(self, text: str) -> bool:
        """Whether there is a file for a prompt; whether it is whole, only `read` knows."""
        return self._path(text).is_file()

    def read(self, text: str) -> dict[str, Tensor] | None:
        """A prompt's embeddings as they were written, on the CPU; None where they are not there, or damaged."""
        path = self._path(text)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                digest = (file.metadata() or {}).get("digest")
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
            if not tensors or digest != digest_of(tensors):
                return None
            os.utime(path)  # it was used now
        except (OSError, SafetensorError):
            return None
        return tensors

    def write(self, text: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a prompt's embeddings, tensors on the CPU. Where that cannot be, they are not kept."""
        flat = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"digest": digest_of(flat)}
        with contextlib.suppress(UserError):
            write_atomic(self._path(text), lambda temporary: save_file(flat, temporary, metadata))

    def make_room(self) -> None:
        """Deletes what was not used for longest while there is too much."""
        files = []
        for path in self.folder.glob(f"{_OURS}*.safetensors"):
            with contextlib.suppress(OSError):  # another process may have been faster
                about = path.stat()
                files.append((about.st_mtime_ns, about.st_size, path))
        size = sum(length for _, length, _ in files)
        if size <= self.most:
            return
        for _, length, path in sorted(files):
            with contextlib.suppress(OSError):
                path.unlink()
            size -= length
            if size <= _ROOM * self.most:
                return

    def _path(self, text: str) -> Path:
        key = hashlib.blake2b(f"{self.model}\0".encode() + text.encode(errors="surrogatepass"), digest_size=20)
        return self.folder / f"{_OURS}{key.hexdigest()}.safetensors"
