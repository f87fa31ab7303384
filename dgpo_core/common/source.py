"""The pictures that a prompt brings with it: what an editor starts from, and what its rewards compare with."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.pixels import Unreadable, picture_bytes, picture_size, read_pixels
from dgpo_core.common.reading import shown

SHAPE_SLACK = 0.02
"""How far the proportions of a source may be from the picture's that is drawn, as a fraction."""


@dataclass(frozen=True)
class Source:
    """A picture, of a file or of memory; two are equal where their `key` is.

    size: (height, width) in pixels. where: file and line of the prompt that brings it, for messages. file: read when
    its pixels are asked for; None where `pixels`, float [3, H, W] in [0, 1], are in memory.
    """

    key: str
    size: tuple[int, int] = field(compare=False)
    where: str = field(default="", compare=False)
    file: Path | None = field(default=None, compare=False)
    pixels: Tensor | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def of_file(path: Path, where: str) -> Source:
        """By the file's head; its pixels are read later. Raises UserError for what is no picture."""
        try:
            content = picture_bytes(path)
            return Source(_digest(content), picture_size(content), where, path)
        except Unreadable as error:
            raise UserError(f"{shown(where, 1000)}: {_unreadable(path, error)}") from None

    @staticmethod
    def of_pixels(pixels: Tensor, where: str = "") -> Source:
        """pixels: float [3, H, W] in [0, 1]."""
        pixels = pixels.detach().to("cpu", torch.float32).contiguous()
        height, width = pixels.shape[-2:]
        return Source(_digest(pixels.numpy().tobytes()), (height, width), where, None, pixels)

    def image(self) -> Tensor:
        """float [3, H, W] in [0, 1], of its own size. Raises UserError where its file cannot be read (any more)."""
        return self.pixels if self.pixels is not None else _read(self)

    def fitted(self, size: tuple[int, int]) -> Tensor:
        """float [3, *size] in [0, 1], scaled where it has another size. Raises UserError for other proportions."""
        self.require_shape(size)
        image = self.image()
        if tuple(image.shape[-2:]) == size:
            return image
        picture = Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
        return _tensor(picture.resize(size[::-1], Image.Resampling.LANCZOS))

    def require_shape(self, size: tuple[int, int]) -> None:
        """Raises UserError where its proportions are not those of a picture of (height, width) `size`."""
        height, width = self.size
        if abs(width / height * size[0] / size[1] - 1) > SHAPE_SLACK:
            name = f"the picture {shown(self.file)}" if self.file else "the source picture"
            raise UserError(
                f"{shown(self.where, 1000) or 'A prompt'}: {name} is {width} x {height} pixels, but the pictures drawn"
                f" here are {size[1]} x {size[0]}: crop it to these proportions, or set model.width and model.height."
            )


def below(name: str, where: str, file: str) -> str:
    """A picture's path as a file gives it: beside that file, or in a folder below it. Raises UserError for another.

    file: what kind of file, such as "prompt file".
    """
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:
        raise UserError(
            f"{where}: the picture {shown(name)} must be beside the {file} or in a folder below it: move it there, and"
            f" give its path from the {file}."
        )
    return name


@functools.lru_cache(maxsize=64)  # of 1024 x 1024 pixels, 12 MB each
def _read(source: Source) -> Tensor:
    assert source.file
    try:
        return _tensor(read_pixels(source.file))
    except Unreadable as error:
        raise UserError(f"{shown(source.where, 1000)}: {_unreadable(source.file, error)}") from None


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def _unreadable(path: Path, error: Exception) -> str:
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        return f"there is no picture {shown(path)}: paths are relative to the file that names it."
    return f"the picture {shown(path)} cannot be read ({shown(str(error).rstrip('.'))})."


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
