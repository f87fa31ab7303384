"""A picture's file from outside: read within bounds, and its pixels the right way up."""

import io
from pathlib import Path

from PIL import Image, ImageOps

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import reason
from dgpo_core.common.reading import read_bytes

MOST_BYTES = 256 * 2**20
MOST_PIXELS = 100_000_000
_ORIENTATION = 0x0112


class Unreadable(Exception):
    """A file is no picture; the text says why, for the end of a sentence."""


def picture_bytes(path: str | Path) -> bytes:
    """The file's content. Raises Unreadable."""
    try:
        return read_bytes(path, "The image", MOST_BYTES)
    except UserError as error:
        raise Unreadable(reason(error)) from None


def opened(data: bytes) -> Image.Image:
    """The picture, not decoded yet. Raises Unreadable for one of too many pixels, and whatever Pillow does."""
    image = Image.open(io.BytesIO(data))
    if image.width * image.height > MOST_PIXELS:
        raise Unreadable(f"{image.width} x {image.height} pixels are too many")
    return image


def read_pixels(path: str | Path) -> Image.Image:
    """The picture the right way up, in RGB. Raises Unreadable."""
    data = picture_bytes(path)
    try:
        with opened(data) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Unreadable:
        raise
    except Exception as error:  # Pillow raises whatever its decoders do: OSError, SyntaxError, ValueError, ...
        raise Unreadable(reason(error)) from None


def picture_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels, the right way up, of a file with this content, by its head. Raises Unreadable."""
    try:
        with opened(data) as image:
            turned = image.format != "PNG" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return image.size if turned else (image.height, image.width)
    except Unreadable:
        raise
    except Exception as error:  # as above
        raise Unreadable(reason(error)) from None
