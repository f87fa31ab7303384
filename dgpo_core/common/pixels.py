"""A picture's file from outside: read within bounds, and its pixels the right way up."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import reason
from dgpo_core.common.reading import read_bytes

MOST_BYTES = 256 * 2**20
MOST_PIXELS = 100_000_000
_ORIENTATION = 0x0112
_PNG_SAYS_HOW = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
"""Where a PNG may say how it is turned, before its pixels or behind them."""


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
            kind = image.format or ""
            return _in_8_bits(ImageOps.exif_transpose(image), kind).convert("RGB")
    except Unreadable:
        raise
    except Exception as error:  # Pillow raises whatever its decoders do: OSError, SyntaxError, ValueError, ...
        raise Unreadable(reason(error)) from None


def picture_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels, the right way up, of a file with this content, by its head. Raises Unreadable."""
    try:
        with opened(data) as image:
            if image.format == "TIFF" or (image.format == "PNG" and any(mark in data for mark in _PNG_SAYS_HOW)):
                return ImageOps.exif_transpose(image).size[::-1]  # decoded: a PNG may say it behind its pixels
            turned = image.format != "PNG" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return image.size if turned else (image.height, image.width)
    except Unreadable:
        raise
    except Exception as error:  # as above
        raise Unreadable(reason(error)) from None


def _in_8_bits(image: Image.Image, kind: str) -> Image.Image:
    """A grey picture of 16 bits, which Pillow would make white wherever it is above 255; any other as it is.

    kind: the format of its file, as Pillow names it. Raises Unreadable for numbers that have no white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        grey = np.asarray(image).clip(0, 2**16 - 1) >> 8  # as Pillow does with colours of 16 bits
        return Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Unreadable("its brightness is in numbers that have no white; save it with 8 or 16 bits")
    return image
