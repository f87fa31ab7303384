"""A folder of rated images as groups to train on: `--groups FOLDER`.

Ratings are looked for in the folder and its subfolders, in all of these forms at once:

    a.json or a.png.json    beside a.png: {"rating": 4, "prompt": "a red circle"}
    ratings.json            {"a.png": 4, "b.png": {"rating": 2, "prompt": "two squares"}}
    *.csv                   with a first line that names the columns file, rating and, if you like, prompt
    *.jsonl                 a preference file (`preference_file`), which makes groups of its own

An image's prompt is the one given with its rating, else the one that ComfyUI wrote into the PNG. Rated images of one
prompt are a group. Images without a rating are no part of it. File names are relative to the file that holds them.
"""

import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dgpo_core.comfy_png import NoPrompt, prompt_of
from dgpo_core.errors import UserError
from dgpo_core.files import reason
from dgpo_core.preference_file import read_preferences
from dgpo_core.preferences import is_rating

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
NAMED = 5  # files that a note names; it counts the others


@dataclass(frozen=True)
class RatedGroup:
    """Image files of one prompt, with a score each; higher is better."""

    prompt: str
    files: tuple[Path, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Gallery:
    """What a folder holds. notes: what was left out, in sentences."""

    groups: tuple[RatedGroup, ...]
    notes: tuple[str, ...]

    @property
    def prompts(self) -> list[str]:
        """Every prompt once, in the order of the groups."""
        return list(dict.fromkeys(group.prompt for group in self.groups))

    @property
    def digest(self) -> str:
        """The same for the same groups, wherever the folder is."""
        rows = [(group.prompt, [path.name for path in group.files], group.scores) for group in self.groups]
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class _Rated:
    """What was said about one image; prompt "": ask the image."""

    rating: float
    prompt: str


@dataclass
class _Found:
    """Groups on the way to a gallery, and what is left out of it."""

    groups: list[RatedGroup] = field(default_factory=list)
    useless: list[str] = field(default_factory=list)
    unrated: int = 0
    lonely: int = 0
    equal: int = 0
    skipped: int = 0


def read_gallery(folder: str | Path) -> Gallery:
    """The rated groups of a folder.

    Raises UserError for a file of ratings that cannot be read (with its line), and where there is nothing to learn.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: --groups takes a folder of rated images.")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    found = _Found()
    rated = _ratings(files)
    in_groups = _read_preferences(files, found)
    images = {path for path in files if path.suffix.lower() in IMAGES}
    found.unrated = len(images - rated.keys() - in_groups)
    _group(rated, found)
    notes = _notes(found)
    if not found.groups:
        hint = f" ({' '.join(notes)})" if notes else ""
        raise UserError(
            f"There is nothing to learn from in {folder}{hint}: give two or more images of one prompt different"
            " ratings, in a .csv, a .jsonl or .json files beside the images."
        )
    return Gallery(tuple(found.groups), tuple(notes))


# --- single ratings --------------------------------------------------------------------------------------------------


def _ratings(files: Sequence[Path]) -> dict[Path, _Rated]:
    """Every image that has a rating; where an image has several, a file beside it goes before one for the folder."""
    rated: dict[Path, _Rated] = {}
    for path in files:
        if path.suffix.lower() == ".csv":
            rated |= _read_csv(path)
    for path in files:
        if path.name == "ratings.json":
            rated |= _read_ratings_json(path)
    for path in files:
        for sidecar in (path.with_suffix(".json"), path.with_name(f"{path.name}.json")):
            if path.suffix.lower() in IMAGES and sidecar.is_file():
                rated |= _rating_in(_read_json(sidecar), path, str(sidecar))
    return rated


def _read_csv(path: Path) -> dict[Path, _Rated]:
    rated: dict[Path, _Rated] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            if not {"file", "rating"} <= set(rows.fieldnames or ()):
                raise UserError(f"{path}:1: the first line must name the columns file and rating (and prompt, if any).")
            for row in rows:
                rated |= _csv_rating(row, path, f"{path}:{rows.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}.") from None
    return rated


def _csv_rating(row: dict[str, Any], path: Path, where: str) -> dict[Path, _Rated]:
    name, text = (row["file"] or "").strip(), (row["rating"] or "").strip()
    if not name:
        raise UserError(f"{where}: there is no file's name.")
    if not text:
        return {}
    try:
        rating = float(text)
    except ValueError:
        raise UserError(f"{where}: the rating must be a number, not {text!r}.") from None
    return _rating_in({"rating": rating, "prompt": row.get("prompt") or ""}, path.parent / name, where)


def _read_ratings_json(path: Path) -> dict[Path, _Rated]:
    found = _read_json(path)
    if not isinstance(found, dict):
        raise UserError(f'{path} must be an object such as {{"a.png": 4, "b.png": 2}}.')
    rated: dict[Path, _Rated] = {}
    for name, value in found.items():
        value = value if isinstance(value, dict) else {"rating": value}
        rated |= _rating_in(value, path.parent / name, f"{path}: {name}")
    return rated


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}.") from None


def _rating_in(record: Any, image: Path, where: str) -> dict[Path, _Rated]:
    """The rating in a JSON object; none where it has none, as in a workflow that lies beside its picture."""
    if not isinstance(record, dict) or record.get("rating") is None:
        return {}
    rating, prompt = record["rating"], record.get("prompt", "")
    if not is_rating(rating):
        raise UserError(f"{where}: the rating must be a number, not {rating!r}.")
    if not isinstance(prompt, str):
        raise UserError(f"{where}: the prompt must be a text.")
    return {image: _Rated(float(rating), prompt.strip())}


# --- groups ----------------------------------------------------------------------------------------------------------


def _group(rated: dict[Path, _Rated], found: _Found) -> None:
    """Images of one prompt, in the order of their names."""
    by_prompt: defaultdict[str, list[tuple[Path, float]]] = defaultdict(list)
    for path, said in sorted(rated.items()):
        prompt = _usable(path, said.prompt, found)
        if prompt:
            by_prompt[prompt].append((path, said.rating))
    for prompt, images in by_prompt.items():
        _add(prompt, [path for path, _ in images], [rating for _, rating in images], found)


def _read_preferences(files: Sequence[Path], found: _Found) -> set[Path]:
    """Adds the groups of the preference files; returns every image that they name."""
    named: set[Path] = set()
    for path in files:
        for preference in read_preferences(path) if path.suffix.lower() == ".jsonl" else ():
            images = [path.parent / name for name in preference.images]
            named.update(images)
            scores = preference.scores()
            if scores is None:
                found.skipped += 1
                continue
            told = [(image, score, _usable(image, preference.prompt, found)) for image, score in _pairs(images, scores)]
            kept = [(image, score, prompt) for image, score, prompt in told if prompt]
            prompts = {prompt for _, _, prompt in kept}
            if len(prompts) > 1:
                raise UserError(f"{path}: {images[0].name} and others are one group but have different prompts.")
            _add(next(iter(prompts), ""), [image for image, _, _ in kept], [score for _, score, _ in kept], found)
    return named


def _pairs(images: Sequence[Path], scores: Sequence[float]) -> Iterator[tuple[Path, float]]:
    return zip(images, scores, strict=True)


def _add(prompt: str, files: Sequence[Path], scores: Sequence[float], found: _Found) -> None:
    if len(files) < 2:
        found.lonely += len(files)
    elif len(set(scores)) == 1:
        found.equal += 1
    else:
        found.groups.append(RatedGroup(prompt, tuple(files), tuple(scores)))


def _usable(path: Path, prompt: str, found: _Found) -> str:
    """The image's prompt; "", and a note, where the file is no whole image or nothing says its prompt."""
    try:
        with Image.open(path) as image:
            chunks = dict(image.info)
            image.verify()
        return prompt or prompt_of(chunks)
    except NoPrompt as error:
        found.useless.append(f"{path} {error}")
    except FileNotFoundError:
        found.useless.append(f"{path} is not there")
    except Exception as error:  # Pillow raises whatever its decoders do: OSError, SyntaxError, ValueError, ...
        found.useless.append(f"{path} is no image that can be read ({reason(error)})")
    return ""


def _notes(found: _Found) -> list[str]:
    counted = [
        (found.lonely, "rated image is the only one of its prompt", "rated images are the only ones of their prompts"),
        (found.equal, "group has equal ratings", "groups have equal ratings"),
        (
            found.skipped,
            "group was skipped or has no better and worse",
            "groups were skipped or have no better and worse",
        ),
        (found.unrated, "image has no rating", "images have no rating"),
    ]
    notes = [f"Left out: {n} {one if n == 1 else many}." for n, one, many in counted if n]
    notes += [f"Left out: {text}." for text in found.useless[:NAMED]]
    if len(found.useless) > NAMED:
        notes.append(f"Left out: {len(found.useless) - NAMED} more like these.")
    return notes
