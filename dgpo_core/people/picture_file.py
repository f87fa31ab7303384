"""A picture's file from outside: its shape, and what programs have written into it besides its pixels.

Texts stand in a PNG's text chunks (before the pixels or behind them), in the EXIF of a JPEG or WebP, and in XMP.
"""

import io
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dgpo_core.comfy.png import GRAPHS, INFOTEXT, OTHERS
from dgpo_core.common.errors import NoPrompt
from dgpo_core.common.files import reason
from dgpo_core.common.pixels import Unreadable, opened, picture_bytes, picture_size

MOST_TEXT = 32 * 2**20
"""Characters of all texts in one picture, unpacked."""
XMP = "XML:com.adobe.xmp"
NAMES = frozenset((*GRAPHS, INFOTEXT, XMP, *OTHERS))
_COMMENT, _EXIF, _RATING = 0x9286, 0x8769, 0x4746
_RATING_TAGS = (b"\x46\x47\x03\x00", b"\x47\x46\x00\x03")  # little and big endian, as a short number
_END = 256 * 2**10
_IN_EXIF = re.compile(r"\s*(prompt|workflow)\s*:\s*(?=\{)", re.IGNORECASE)
_XMP_RATING = re.compile(r"""\bxmp:Rating\s*(?:=\s*["']|>)\s*(-?\d{1,3}(?:\.\d{1,6})?)\s*["'<]""")


@dataclass(frozen=True)
class PictureFile:
    """height, width: in pixels, the right way up. texts: (name, text); rating: a photo tool's, None for none."""

    height: int
    width: int
    texts: tuple[tuple[str, str], ...]
    rating: float | None

    def chunks(self) -> Mapping[str, str]:
        """The texts by name. Raises NoPrompt where two of one name differ."""
        found: dict[str, str] = {}
        for name, text in self.texts:
            if found.setdefault(name, text) != text and name != XMP:
                raise NoPrompt(f"holds two different texts named {name!r}")
        return found


def read_picture(path: str | Path) -> PictureFile:
    """What is in a picture's file, which is whole. Raises Unreadable."""
    data = picture_bytes(path)
    try:
        with opened(data) as image:
            tags = _tags(image)
            texts = [*(_png_texts(data) if image.format == "PNG" else ()), *_exif_texts(tags), *_xmp_of(image.info)]
            _check_whole(image)
    except Unreadable:
        raise
    except Exception as error:  # Pillow raises whatever its decoders do: OSError, SyntaxError, ValueError, ...
        raise Unreadable(reason(error)) from None
    said = [xmp_rating(text) for name, text in texts if name == XMP]
    said.append(_stars(tags.get(_RATING)))
    rating = next((value for value in said if value is not None), None)
    return PictureFile(*picture_size(data), tuple(texts), rating)


def xmp_rating(text: str) -> float | None:
    """The rating in an XMP packet: 1 to 5 stars, or -1 for rejected. None where there is none, which 0 also means."""
    found = _XMP_RATING.search(text)
    return _stars(float(found[1])) if found else None


def _stars(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value and -1 <= value <= 5 else None


def _check_whole(image: Image.Image) -> None:
    """Raises where the file was cut short: of a PNG, the checksums tell; others have to be decoded."""
    if image.format == "PNG":
        image.verify()
    else:
        image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))  # a JPEG's eighth costs little
        image.load()


def hints_at_rating(path: Path) -> bool:
    """Whether a picture may hold a rating, from both ends of its file: what stands there need not be one.

    Raises Unreadable for a file that the system does not let us open.
    """
    try:
        with open(path, "rb") as file:
            ends = file.read(_END)
            if file.seek(0, io.SEEK_END) > _END:
                file.seek(max(_END, file.tell() - _END))
                ends += file.read(_END)
    except OSError as error:
        raise Unreadable(reason(error)) from None
    return b"xmp:Rating" in ends or any(tag in ends for tag in _RATING_TAGS)


# --- texts -----------------------------------------------------------------------------------------------------------


def _tags(image: Image.Image) -> dict[int, Any]:
    """EXIF; a PNG's is not looked for behind the pixels, which would have to be decoded for it."""
    if image.format == "PNG" and "exif" not in image.info:
        return {}
    exif = image.getexif()
    return dict(exif) | dict(exif.get_ifd(_EXIF))


def _png_texts(data: bytes) -> Iterator[tuple[str, str]]:
    """The texts of a PNG, wherever they stand in it. PNG specification, 11.3.3."""
    place, room = 8, MOST_TEXT
    while place + 12 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            name, _, rest = data[place + 8 : place + 8 + length].partition(b"\0")
            if name.decode("latin-1") in NAMES:
                text = _chunk(kind, rest, room)
                room -= len(text)
                yield name.decode("latin-1"), _decoded(text)
        place += 12 + length


def _chunk(kind: bytes, rest: bytes, room: int) -> bytes:
    """The text of a chunk, unpacked; rest: what follows its name."""
    if kind == b"tEXt":
        packed, text = False, rest
    elif kind == b"zTXt":
        packed, text = True, rest[1:]
    else:  # a flag, a method, a language and a translated name go before
        packed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    if packed:
        unpack = zlib.decompressobj()
        text = unpack.decompress(text, room + 1)
    if len(text) > room:
        raise Unreadable("its texts are too long")
    return text


def _decoded(text: bytes) -> str:
    """UTF-8, which some write where the specification has Latin-1."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")


def _exif_texts(tags: Mapping[int, Any]) -> Iterator[tuple[str, str]]:
    """ComfyUI's savers write "prompt:{...}" into any text; A1111's web UI an infotext into the user's comment."""
    for value in tags.values():
        found = _IN_EXIF.match(value) if isinstance(value, str) else None
        if found:
            yield found[1].lower(), value[found.end() :].rstrip("\0")
    comment = _comment(tags.get(_COMMENT))
    found = _IN_EXIF.match(comment)
    if found:
        yield found[1].lower(), comment[found.end() :]
    elif comment.startswith("{"):
        yield GRAPHS[0], comment
    elif comment:
        yield INFOTEXT, comment


def _comment(value: Any) -> str:
    """The user's comment in EXIF: eight bytes that name the code, and the text."""
    if not isinstance(value, bytes):
        return value.strip("\0 ") if isinstance(value, str) else ""
    code, text = value[:8], value[8:]
    if code.startswith(b"UNICODE"):
        little = text[1:2] == b"\0" or text[:2] == b"\xff\xfe"
        return text.decode("utf-16-le" if little else "utf-16-be", "replace").strip("\0\ufeff ")
    return _decoded(text).strip("\0 ")


def _xmp_of(info: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    packet = info.get("xmp")
    if isinstance(packet, bytes | str):
        yield XMP, packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet
