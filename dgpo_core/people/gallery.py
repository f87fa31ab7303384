"""A folder of rated images as groups to train on: `--groups FOLDER`.

Ratings are looked for in the folder and its subfolders, in all forms of `ratings` at once, and in

    *.jsonl                 preference files (`preference_file`), which make groups of their own

An image's prompt is the one given with its rating, else the one that ComfyUI or A1111's web UI wrote into it
(`comfy_png`). Rated images of one prompt are a group. Images without a rating are no part of it, nor is what lies in
hidden folders and bins. Whatever is left out is told.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dgpo_core.comfy.png import prompt_of
from dgpo_core.common.errors import NoPrompt, UserError
from dgpo_core.common.pixels import Unreadable
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.reading import kind_at, shown
from dgpo_core.common.source import Source, below
from dgpo_core.people.picture_file import read_picture
from dgpo_core.people.preference_file import Preference, is_preference_file, read_preferences
from dgpo_core.people.preferences import Told, told_apart
from dgpo_core.people.ratings import IMAGES, Rated, read_ratings, unread

NAMED = 5  # files that a note names; it counts the others
BINS = frozenset(
    ("$recycle.bin", "recycler", "#recycle", "@eadir", "__macosx", "thumbs", "lost+found", "system volume information")
)
"""Folders in which systems and photo tools keep what was thrown away, and previews; hidden ones begin with a dot."""
MOST_CROPPED = 0.1
"""Of a picture's height or width. A little more sky is no other picture; a portrait without its head is one."""


def cropped(shape: tuple[int, int], size: tuple[int, int]) -> float:
    """The share of a picture that is lost where it is scaled to cover `size` and cropped; both (height, width)."""
    ratio = shape[1] * size[0] / (shape[0] * size[1])
    return 1 - min(ratio, 1 / ratio)


@dataclass(frozen=True)
class RatedGroup:
    """Image files of one prompt, with a score each; higher is better. shapes: (height, width) of each in pixels.

    told: the pairs (i, j, p) that were judged, as `told_apart` has them, where that was said of pairs. sources: the
    pictures that they are edits of.
    """

    prompt: str
    files: tuple[Path, ...]
    scores: tuple[float, ...]
    shapes: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    told: tuple[Told, ...] = field(default=(), compare=False)
    sources: tuple[Source, ...] = ()

    def only(self, kept: Sequence[int]) -> "RatedGroup":
        """With these of its images."""
        return replace(
            self,
            files=tuple(self.files[i] for i in kept),
            scores=tuple(self.scores[i] for i in kept),
            shapes=tuple(self.shapes[i] for i in kept),
            told=tuple((kept.index(i), kept.index(j), p) for i, j, p in self.told if i in kept and j in kept),
        )


@dataclass(frozen=True)
class Gallery:
    """What a folder holds. notes: what was left out, in sentences."""

    groups: tuple[RatedGroup, ...]
    notes: tuple[str, ...]

    @property
    def prompts(self) -> list[Prompt]:
        """Every prompt, with its sources, once, in the order of the groups."""
        found = {(group.prompt, group.sources): next((s.where for s in group.sources), "") for group in self.groups}
        return [Prompt(text, {}, where, sources) for (text, sources), where in found.items()]

    @property
    def digest(self) -> str:
        """The same for the same groups, wherever the folder is."""
        rows = [
            (group.prompt, [path.name for path in group.files], group.scores, *([s.key] for s in group.sources))
            for group in self.groups
        ]
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()

    def fitting(self, size: tuple[int, int]) -> "Gallery":
        """What can be trained at `size` (height, width) and still shows what was rated; the notes are about that alone.

        Pictures are scaled to cover the size and cropped at the centre. One that would lose more than `MOST_CROPPED`
        is left out. Raises UserError where nothing remains.
        """
        found, lost = _Found(), [_lost(group, size) for group in self.groups]
        for group, shares in zip(self.groups, lost, strict=True):
            kept = [i for i, share in enumerate(shares) if share <= MOST_CROPPED]
            _add(group.only(kept), found)
        notes = (*_shape_notes(self.groups, lost, size), *_notes(found))
        if not found.groups:
            raise UserError(
                f"There is nothing to learn from: no group has two pictures of that shape ({' '.join(notes)})"
            )
        return Gallery(tuple(found.groups), notes)


@dataclass
class _Found:
    """Groups on the way to a gallery, and what is left out of it."""

    groups: list[RatedGroup] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    useless: list[str] = field(default_factory=list)
    unrated: int = 0
    lonely: int = 0
    equal: int = 0
    skipped: int = 0
    by_taste: int = 0


def read_preference_gallery(path: str | Path) -> Gallery:
    """The groups of one preference file. Raises UserError as `read_gallery`."""
    path = Path(path)
    found = _Found()
    _read_preferences([path], path.parent, found)
    if not found.groups:
        raise UserError(f"There is nothing to learn from in {shown(path)}: {' '.join(_notes(found)) or 'it is empty.'}")
    return Gallery(tuple(found.groups), tuple(_notes(found)))


def read_gallery(folder: str | Path) -> Gallery:
    """The rated groups of a folder.

    Raises UserError for a file of ratings that is wrong (with its line; one beside an image is left out), and where
    there is nothing to learn.
    """
    folder = Path(folder)
    if kind_at(folder, "The folder") != "folder":
        raise UserError(f"There is no folder {shown(folder)}: --groups takes a folder of rated images.")
    found = _Found()
    files = _seen(folder, found)
    ratings = read_ratings(files)
    found.notes += [*_some(ratings.notes), *unread(files)]
    in_groups = _read_preferences(files, folder, found)
    images = {path for path in files if path.suffix.lower() in IMAGES} - ratings.not_pictures
    before = {said.source for said in ratings.rated.values()}
    found.unrated = len(images - ratings.rated.keys() - in_groups - before)
    rated = {path: said for path, said in ratings.rated.items() if path not in ratings.not_pictures}
    _group(rated, folder, found)
    notes = _notes(found)
    if not found.groups:
        hint = f" ({' '.join(notes)})" if notes else ""
        raise UserError(
            f"There is nothing to learn from in {shown(folder)}{hint}: give two or more images of one prompt different"
            " ratings, in a .csv, a .jsonl or .json files beside the images."
        )
    return Gallery(tuple(found.groups), tuple(notes))


# --- files -----------------------------------------------------------------------------------------------------------


def _seen(folder: Path, found: _Found) -> list[Path]:
    """The files of a folder and its subfolders, without those in hidden ones and bins."""
    files = [path for path in sorted(folder.rglob("*")) if os.path.isfile(path)]
    hidden = [path for path in files if _hidden(path, folder)]
    places = Counter(_hidden(path, folder) for path in hidden if path.suffix.lower() in IMAGES)
    if places:
        names = ", ".join(shown(name, 60) for name in list(places)[:NAMED])
        count = sum(places.values())
        found.notes.append(f"Left out: {_count(count, 'image')} in hidden folders and bins ({names})")
    gone = set(hidden)
    return [path for path in files if path not in gone]


def _hidden(path: Path, folder: Path) -> str:
    """The part of the way from the folder to a file that hides it; "" for none."""
    parts = path.relative_to(folder).parts if path.is_relative_to(folder) else ()
    return next((part for part in parts if part.startswith(".") or part.lower() in BINS), "")


def _usable(path: Path, folder: Path, prompt: str, found: _Found) -> tuple[str, tuple[int, int]]:
    """The image's prompt and shape; "" and a note, where the file is no whole image or nothing says its prompt."""
    name = shown(path, 1000)
    try:
        if _hidden(path, folder):
            found.useless.append(f"{name} is in a hidden folder or bin")
        elif not os.path.exists(path):  # Path.exists raises for a name that is too long
            found.useless.append(f"{name} is not there")
        else:
            picture = read_picture(path)
            return prompt or prompt_of(picture.chunks()), (picture.height, picture.width)
    except NoPrompt as error:
        found.useless.append(f"{name} {error}")
    except Unreadable as error:
        found.useless.append(f"{name} is no image that can be read ({error})")
    except (OSError, ValueError):  # a name that no file can have
        found.useless.append(f"{name} is not there")
    return "", (0, 0)


# --- groups ----------------------------------------------------------------------------------------------------------


def _group(rated: dict[Path, Rated], folder: Path, found: _Found) -> None:
    """Images of one prompt and source, in the order of their names."""
    alike: defaultdict[Prompt, list[tuple[Path, float, tuple[int, int]]]] = defaultdict(list)
    for path, said in sorted(rated.items(), key=lambda item: item[0]):
        prompt, shape = _usable(path, folder, said.prompt, found)
        if prompt:
            sources = (Source.of_file(said.source, said.where),) if said.source else ()
            alike[Prompt(prompt, sources=sources)].append((path, said.rating, shape))
    for asked, images in alike.items():
        paths, scores, shapes = zip(*images, strict=True)
        _add(RatedGroup(asked.text, paths, scores, shapes, sources=asked.sources), found)


def _read_preferences(files: Sequence[Path], folder: Path, found: _Found) -> set[Path]:
    """Adds the groups of the preference files; returns every picture that they name."""
    named: set[Path] = set()
    for path in files:
        if path.suffix.lower() != ".jsonl":
            continue
        if not is_preference_file(path):
            found.notes.append(
                f"Left out: {shown(path, 1000)} is no preference file: no line says which images are better"
            )
            continue
        for preference in read_preferences(path):
            images = [path.parent / name for name in preference.images]
            named.update(images, (path.parent / name for name in preference.sources))
            if preference.by:
                found.by_taste += 1
                continue
            scores = preference.scores()
            if scores is None:
                found.skipped += 1
                continue
            told = [(*_usable(image, folder, preference.prompt, found), image, score)
                    for image, score in zip(images, scores, strict=True)]  # fmt: skip
            kept = [i for i, (prompt, *_) in enumerate(told) if prompt]
            prompts = {told[i][0] for i in kept}
            if len(prompts) > 1:
                raise UserError(
                    f"{shown(path, 1000)}: {images[0].name} and others are one group but have different prompts."
                )
            pairs = tuple(told_apart(preference.answer, len(images))) if "pairs" in preference.answer else ()
            shapes = tuple(shape for _, shape, *_ in told)
            before = _sources(preference, path)
            group = RatedGroup(next(iter(prompts), ""), tuple(images), tuple(scores), shapes, pairs, before)
            _add(group.only(kept), found)
    return named


def _sources(preference: Preference, path: Path) -> tuple[Source, ...]:
    """Of the group of a line. Raises UserError for what is no picture, or outside of the file's folder."""
    where = shown(path, 1000)
    return tuple(
        Source.of_file(path.parent / below(name, where, "preference file"), where) for name in preference.sources
    )


def _add(group: RatedGroup, found: _Found) -> None:
    if len(group.files) < 2:
        found.lonely += len(group.files)
    elif len(set(group.scores)) == 1:
        found.equal += 1
    else:
        found.groups.append(group)


# --- notes -----------------------------------------------------------------------------------------------------------


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _some(notes: Sequence[str]) -> Iterator[str]:
    yield from notes[:NAMED]
    if len(notes) > NAMED:
        yield f"Left out: {len(notes) - NAMED} more like these"


def _notes(found: _Found) -> list[str]:
    counted = [
        (found.lonely, "rated image is the only one of its prompt", "rated images are the only ones of their prompts"),
        (found.equal, "group has equal ratings", "groups have equal ratings"),
        (
            found.skipped,
            "group was skipped or has no better and worse",
            "groups were skipped or have no better and worse",
        ),
        (found.by_taste, "group was answered by a taste, not by you", "groups were answered by a taste, not by you"),
        (found.unrated, "image has no rating", "images have no rating"),
    ]
    notes = [*found.notes, *(f"Left out: {n} {one if n == 1 else many}" for n, one, many in counted if n)]
    notes += _some([f"Left out: {text}" for text in found.useless])
    return [f"{note}." for note in notes]


def _lost(group: RatedGroup, size: tuple[int, int]) -> list[float]:
    return [cropped(shape, size) for shape in group.shapes]


def _shape_notes(groups: Sequence[RatedGroup], lost: Sequence[Sequence[float]], size: tuple[int, int]) -> list[str]:
    """What becomes of pictures whose shape is not the training's."""
    rows = [(share, path, shape) for group, shares in zip(groups, lost, strict=True)
            for share, path, shape in zip(shares, group.files, group.shapes, strict=True)]  # fmt: skip
    out = [row for row in rows if row[0] > MOST_CROPPED]
    little = [share for share, *_ in rows if 0.01 < share <= MOST_CROPPED]
    small = [path for share, path, shape in rows if share <= MOST_CROPPED and min(shape) < min(size)]
    notes = []
    if out:
        (height, width), _ = Counter(shape for *_, shape in out).most_common(1)[0]
        path = next(path for _, path, shape in out if shape == (height, width))
        notes.append(
            f"Left out: {_count(len(out), 'image')} of another shape than the training's {size[1]} x {size[0]}"
            f" pixels, such as {shown(path, 1000)} with {width} x {height}: a crop would show something else than what"
            " was rated. Train at their shape with --model.width and --model.height, or crop them yourself."
        )
    if little:
        notes.append(f"{_count(len(little), 'image')} cropped at the centre, by {max(little):.0%} at most.")
    if small:
        notes.append(f"{_count(len(small), 'image')} smaller than {size[1]} x {size[0]} pixels and so enlarged.")
    return notes
