"""Ratings of single images, in all the forms that a folder can hold at once:

    a.json or a.png.json    beside a.png: {"rating": 4, "prompt": "a red circle"}; where a.png is an edit of another
                            picture, with {"source": "before.png"}
    ratings.json            {"a.png": 4, "b.png": {"rating": 2, "prompt": "two squares"}}
    *.csv                   with a first line that names the columns file, rating and, if you like, prompt and source
    a.png.xmp or a.xmp      stars of digiKam, darktable, Lightroom and the like; they may be in the image itself, too
    metadata.json           stars of Eagle, in a folder NAME.info with its image

File names are relative to the file that holds them. Where an image has several ratings, a file beside it goes before
one for the folder, and that before stars; where two of the same kind differ, the image is left out. A file beside an
image may be of another program, which has its own ratings: what cannot be read as one is left out, and told.
"""

import contextlib
import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.common.pixels import Unreadable
from dgpo_core.common.reading import read_bytes, read_json, read_text, shown
from dgpo_core.common.source import below
from dgpo_core.people.picture_file import hints_at_rating, read_picture, xmp_rating
from dgpo_core.people.preferences import MOST_RATING, is_rating

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
STARS, TABLE, BESIDE = 0, 1, 2
"""How near to its image a rating stands; the nearest counts."""
UNREAD = {
    ".pp3": "RawTherapee",
    ".dop": "DxO PhotoLab",
    ".cos": "Capture One",
    ".on1": "ON1",
    ".lrcat": "Lightroom's catalogue",
    ".lrdata": "Lightroom's catalogue",
}
"""Files of photo tools that may hold ratings in forms that are not read."""
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True)
class Rated:
    """What was said about one image. prompt "": ask the image. where: file, and line; nearness: as above.

    source: the picture that it is an edit of.
    """

    rating: float
    prompt: str
    where: str
    nearness: int
    source: Path | None = None

    def agrees(self, other: "Rated") -> bool:
        """Whether both give one rating and one source, and no two prompts."""
        same = self.rating == other.rating and self.source == other.source
        return same and (self.prompt == other.prompt or not (self.prompt and other.prompt))


@dataclass
class Ratings:
    """Every image that has a rating, and what is to be told: foreign files, and ratings that contradict each other.

    not_pictures: files that look like pictures of the folder's, but are previews of another.
    """

    rated: dict[Path, Rated] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    not_pictures: set[Path] = field(default_factory=set)
    _disputed: dict[Path, str] = field(default_factory=dict)

    def add(self, image: Path, new: Rated) -> None:
        """Keep the nearest."""
        image = Path(os.path.normpath(image))
        old = self.rated.setdefault(image, new)
        if old.nearness < new.nearness:
            self.rated[image] = new
            self._disputed.pop(image, None)
        if old.rating != new.rating and old.nearness != new.nearness:
            near, far = sorted((old, new), key=lambda one: -one.nearness)
            self.notes.append(
                f"{shown(image, 1000)} is rated {near.rating:g} in {near.where}, which counts, and {far.rating:g} in"
                f" {far.where}"
            )
        elif old.nearness == new.nearness and not old.agrees(new):
            values = f"{old.rating:g} in {old.where} and {new.rating:g} in {new.where}"
            what = "has two prompts, rated" if old.rating == new.rating else "is rated"
            what = "is an edit of two pictures, rated" if old.source != new.source else what
            self._disputed[image] = f"Left out: {shown(image, 1000)} {what} {values}"

    def settle(self) -> None:
        """Leave out the images about which two equally near ratings differ."""
        for image, note in self._disputed.items():
            del self.rated[image]
            self.notes.append(note)
        self._disputed.clear()


def read_ratings(files: Sequence[Path]) -> Ratings:
    """All ratings among the files of a folder.

    Files that hold no ratings are told in the notes, and so is one beside an image that is wrong; for a table, or a
    ratings.json, that is wrong, UserError names it and the line.
    """
    found, there = Ratings(), set(files)
    for path in files:
        if path.suffix.lower() == ".csv":
            _read_csv(path, found)
        elif path.name == "ratings.json":
            _read_ratings_json(path, found)
        elif path.name == "metadata.json" and path.parent.suffix == ".info":
            _read_eagle(path, found)
    for path in files:
        if path.suffix.lower() in IMAGES:
            _read_beside(path, there, found)
    found.settle()
    return found


def unread(files: Sequence[Path]) -> Iterator[str]:
    """A sentence about each form of ratings that is not read."""
    for suffix, tool in UNREAD.items():
        count = sum(path.suffix.lower() == suffix for path in files)
        if count:
            yield f"{count} {suffix} file{'s' * (count > 1)} ({tool}) not read: write ratings as XMP or CSV"


# --- tables ----------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, found: Ratings) -> None:
    """A table with commas, semicolons or tabs, whichever makes its first line name what is needed."""
    text, trouble = _table_text(path)
    lines = io.StringIO(text, newline="").readlines()  # with the ends that they have
    skipped = 1 if lines and re.fullmatch(r"sep=.\s*", lines[0]) else 0  # Excel's own note to itself
    first = lines[skipped] if len(lines) > skipped else ""
    delimiter = next((d for d in _DELIMITERS if {"file", "rating"} <= set(_columns(first, d))), "")
    if not delimiter:
        found.notes.append(
            f"Left out: {shown(path, 1000)} is no table of ratings: its first line does not name the columns file and"
            " rating"
        )
        return
    if trouble:
        raise UserError(f"{shown(path, 1000)} cannot be read: {trouble}.")
    for where, row in _rows(path, lines[skipped:], delimiter, skipped):
        name, rating = row["file"], row["rating"]
        if not name:
            raise UserError(f"{where}: there is no file's name.")
        if rating:
            value = _number(rating, decimal_comma=delimiter != ",")
            said = {name: row.get(name, "") for name in ("prompt", "source")}
            record = {**said, "rating": rating if value is None else value}
            _add(record, path.parent / name, path.parent, where, TABLE, found)


def _table_text(path: Path) -> tuple[str, str]:
    """The text of a table, and what is wrong with it. Excel's "Unicode text" is UTF-16."""
    data = read_bytes(path, "The table")
    for mark, code in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"", "utf-8-sig")):
        if data.startswith(mark):
            try:
                return data.decode(code), ""
            except UnicodeDecodeError:
                return data.decode(code, "replace"), "it is not UTF-8 text; save it as CSV UTF-8"
    raise AssertionError("every text starts with nothing")


def _columns(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip().lower() for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _rows(path: Path, lines: Sequence[str], delimiter: str, skipped: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row by its columns, and where it stands. Raises UserError for one that does not fit the first line."""
    names = _columns(lines[0], delimiter)
    twice = next((name for name in ("file", "rating", "prompt", "source") if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{shown(path, 1000)}:{skipped + 1}: there are two columns {twice}.")
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    try:
        next(rows)
        for row in rows:
            where = f"{shown(path, 1000)}:{rows.line_num + skipped}"
            if any(value.strip() for value in row[len(names) :]):
                raise UserError(
                    f"{where}: there are more columns than the first line names: put a prompt that has"
                    f" {'tabs' if delimiter == chr(9) else repr(delimiter)} in it between double quotes."
                )
            if any(value.strip() for value in row):  # spreadsheets write rows of nothing but delimiters
                padded = [*row, *[""] * len(names)]
                yield where, {name: value.strip() for name, value in zip(names, padded, strict=False)}
    except csv.Error as error:
        raise UserError(f"{shown(path, 1000)}:{rows.line_num + skipped}: cannot be read: {error}.") from None


def _number(text: str, decimal_comma: bool) -> float | None:
    """A text as a number; None where it is none."""
    text = text.replace(",", ".") if decimal_comma else text
    return float(text) if len(text) < 50 and _NUMBER.fullmatch(text) else None


def _read_ratings_json(path: Path, found: Ratings) -> None:
    said = read_json(path, "The file")
    if not isinstance(said, dict):
        raise UserError(f'{shown(path, 1000)} must be an object such as {{"a.png": 4, "b.png": 2}}.')
    for name, value in said.items():
        record = value if isinstance(value, dict) else {"rating": value}
        _add(record, path.parent / name, path.parent, f"{shown(path, 1000)}: {shown(name)}", TABLE, found)


def _add(record: Any, image: Path, folder: Path, where: str, nearness: int, found: Ratings) -> None:
    """The rating in an object; none where it has none, as in a workflow that lies beside its picture.

    folder: of the file that says so. Raises UserError for what is there and is wrong.
    """
    if not isinstance(record, Mapping) or record.get("rating") in (None, ""):
        return
    rating, prompt, source = record["rating"], record.get("prompt"), record.get("source")
    if not is_rating(rating):
        raise UserError(
            f"{where}: the rating must be a number, not {_told(rating)}; it is at most {MOST_RATING:,} either way."
        )
    if not isinstance(prompt, str | None):
        raise UserError(f"{where}: the prompt must be a text.")
    if not isinstance(source, str | None):
        raise UserError(f'{where}: "source" must be the path of a picture.')
    before = folder / below(source.strip(), where, "ratings") if source and source.strip() else None
    if before and nearness == BESIDE and not os.path.isfile(before):
        raise UserError(f'{where}: "source" must be the path of a picture, not {_told(source)}.')
    found.add(image, Rated(float(rating), (prompt or "").strip(), where, nearness, before))


def _told(value: Any) -> str:
    return repr(shown(value, 60)) if isinstance(value, str) else shown(value, 60)


# --- beside an image, and in it --------------------------------------------------------------------------------------


def _read_beside(image: Path, there: set[Path], found: Ratings) -> None:
    for path in (image.with_suffix(".json"), image.with_name(f"{image.name}.json")):
        if path in there and path.name not in ("ratings.json", "metadata.json"):
            _add_beside(path, image, found)
    for path in (image.with_suffix(".xmp"), image.with_name(f"{image.name}.xmp")):
        if path in there:
            _add_stars(xmp_rating(_xmp(path, found)), image, path, found)
    if image not in found.rated:
        _add_own_stars(image, found)


def _add_beside(path: Path, image: Path, found: Ratings) -> None:
    """What a file beside its image says. Downloaders and galleries write such files, too, with ratings of any kind and
    the address of the picture as its source."""
    try:
        _add(read_json(path, "The file"), image, path.parent, shown(path, 1000), BESIDE, found)
    except UserError as error:
        found.notes.append(f"Left out: {str(error).removeprefix('The file ').rstrip('.')}")


def _add_own_stars(image: Path, found: Ratings) -> None:
    try:
        hinted = hints_at_rating(image)
    except Unreadable as error:
        found.notes.append(f"Left out: {shown(image, 1000)} cannot be opened ({error})")
        return
    if hinted:
        with contextlib.suppress(Unreadable):  # it is told where it is used, and an image without a rating is not
            _add_stars(read_picture(image).rating, image, image, found)


def _xmp(path: Path, found: Ratings) -> str:
    try:
        return read_text(path, "The file")
    except UserError as error:
        found.notes.append(f"Left out: {str(error).removeprefix('The file ').rstrip('.')}")
        return ""


def _add_stars(stars: float | None, image: Path, path: Path, found: Ratings) -> None:
    if stars is not None:
        found.add(image, Rated(stars, "", shown(path, 1000), STARS))


def _read_eagle(path: Path, found: Ratings) -> None:
    """Eagle keeps each picture in a folder of its own, with its data and a preview."""
    said = read_json(path, "The file")
    if not isinstance(said, dict) or not all(isinstance(said.get(key), str) for key in ("name", "ext")):
        return
    found.not_pictures.add(path.parent / f"{said['name']}_thumbnail.png")
    image, stars = path.parent / f"{said['name']}.{said['ext']}", said.get("star")
    if said.get("isDeleted") is True:
        found.not_pictures.add(image)
    elif is_rating(stars) and stars:
        _add_stars(float(stars), image, path, found)
