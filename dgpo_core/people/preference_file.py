"""The preference file: what a person thinks of groups of images, one JSON object per line, one line per group.

    {"prompt": "a red circle", "images": ["a.png", "b.png", "c.png"], "ranking": [[2], [0]], "version": 2}
    {"prompt": "a red circle", "images": ["a.png", "b.png", "c.png"], "ranking": [[2]], "worst": [1], "version": 2}
    {"prompt": "a red circle", "images": ["d.png", "e.png", "f.png"], "ratings": [5, 2, null]}
    {"prompt": "two squares", "images": ["g.png", "h.png", "i.png"], "pairs": [[0, ">", 1], [1, "=", 2]]}
    {"prompt": "two squares", "images": ["j.png", "k.png"], "thumbs": [1, -1]}
    {"prompt": "two squares", "images": ["l.png", "m.png"], "skip": true}

    {"prompt": "two squares", "images": ["n-0.png", "n-1.png"], "ratings": [0.4, -0.4], "by": "taste", "version": 3}

images: files, relative to the folder that the preference file is in; where they are edits, "sources" are the pictures
that they are made of, likewise. ranking (and worst), pairs, thumbs, ratings, skip:
one of them, as `preferences` has it. prompt: may be left out where the images hold it (`comfy_png`). version: 2, or
none. It matters to a ranking that leaves images out: in lines without a version they count as middling, as they always
did (`preferences.middling_scores`), not as worse than all that are ranked. by: "taste" where nobody was asked, because
a taste was sure (`apprentice`). Such lines have the version 3, so that programs that do not know them refuse them, and
count as nobody's answer: no gallery and no taste is made of them.

Whoever asks a person, in ComfyUI or headless, keeps the answers in such a file. There a line also has `key`, which says
what question it answers (of several lines with one key, the last counts), and `time`, in seconds since 1970. So the
answers of a run, beside their images, are themselves a folder for `--groups`.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import reason
from dgpo_core.common.reading import lines_of, parse_json, read_text, shown
from dgpo_core.people.preferences import KINDS, WORST, is_rating, middling_scores, scores_from
from dgpo_core.settings.config import TASTE

VERSION = 2
"""Of the lines that are written for people."""
TASTE_VERSION = 3
"""Of the lines that are written for a taste."""


@dataclass(frozen=True)
class Preference:
    """What was said about one group. answer: as `preferences` describes it; key: the question's, "" for none.

    by: TASTE where no person said it. agreed: the share of a person's pairs that a taste had ordered alike beforehand.
    sources: the pictures that the images are edits of.
    """

    prompt: str
    images: tuple[str, ...]
    answer: Mapping[str, Any]
    key: str = ""
    by: str = ""
    agreed: float | None = None
    sources: tuple[str, ...] = ()

    def scores(self) -> list[float] | None:
        """The images' scores; None where nothing was said that tells one from another."""
        return scores_from(self.answer, len(self.images))

    def line(self) -> str:
        """As the file holds it."""
        record = {"prompt": self.prompt, "images": list(self.images), **self.answer, "version": VERSION}
        if self.sources:
            record["sources"] = list(self.sources)
        if self.by:
            record |= {"by": self.by, "version": TASTE_VERSION}
        if self.agreed is not None:
            record["agreed"] = round(self.agreed, 4)
        if self.key:
            record |= {"key": self.key, "time": round(time.time())}
        return json.dumps(record, ensure_ascii=False) + "\n"

    @staticmethod
    def of(record: Any) -> "Preference":
        """Raises UserError in one sentence where `record` is no line of a preference file."""
        if not isinstance(record, dict):
            raise UserError('A preference must be an object such as {"images": ["a.png", "b.png"], "ratings": [5, 2]}.')
        images, prompt, key = record.get("images"), record.get("prompt", ""), record.get("key", "")
        if not isinstance(images, list) or not images or not all(isinstance(name, str) and name for name in images):
            raise UserError('"images" must be a list of the names of the group\'s files.')
        if not isinstance(prompt, str) or not isinstance(key, str):
            raise UserError('"prompt" must be a text.')
        sources = record.get("sources", [])
        if not isinstance(sources, list) or not all(isinstance(name, str) and name for name in sources):
            raise UserError('"sources" must be a list of the names of the pictures that the images are edits of.')
        version = record.get("version", 1)
        by, agreed = record.get("by", ""), record.get("agreed")
        if type(version) is not int or not 1 <= version <= (TASTE_VERSION if by else VERSION):
            raise UserError(f'"version" must be {VERSION} or left out, not {version!r}.')
        if by not in ("", TASTE) or (by == TASTE) != (version == TASTE_VERSION):
            raise UserError(f'"by" must be "{TASTE}" in a line of version {TASTE_VERSION}, or left out.')
        if agreed is not None and not (is_rating(agreed) and 0 <= agreed <= 1):
            raise UserError(f'"agreed" must be a share from 0 to 1, not {agreed!r}.')
        answer = {kind: record[kind] for kind in (*KINDS, WORST, "skip") if kind in record}
        scores_from(answer, len(images))
        if version == 1:
            answer = _first_version(answer, len(images))
        return Preference(prompt.strip(), tuple(images), answer, key, by, agreed, tuple(sources))


def _first_version(answer: dict[str, Any], size: int) -> dict[str, Any]:
    """What a line without a version says, in the words of today: a ranking that leaves images out, by its scores."""
    ranking = answer.get("ranking", [])
    if WORST in answer:
        raise UserError(f'"{WORST}" needs "version": {VERSION} in its line.')
    return answer if sum(map(len, ranking)) in (0, size) else {"ratings": middling_scores(ranking, size)}


def read_preferences(path: str | Path) -> list[Preference]:
    """All of a file, the last one of each key. Raises UserError naming file and line for what is wrong with it."""
    found: dict[str, Preference] = {}
    for number, line in _lines(path):
        try:
            preference = Preference.of(parse_json(line, "The line"))
        except UserError as error:
            raise UserError(f"{shown(path, 1000)}:{number}: {error}") from None
        found[preference.key or f"line {number}"] = preference
    return list(found.values())


def is_preference_file(path: str | Path) -> bool:
    """Whether any line says something about a group of images; other programs write .jsonl files, too."""
    with contextlib.suppress(UserError):
        return any(_answers(line) for _, line in _lines(path))
    return False


def _answers(line: str) -> bool:
    with contextlib.suppress(UserError):
        record = parse_json(line, "The line")
        return isinstance(record, dict) and "images" in record and any(kind in record for kind in (*KINDS, "skip"))
    return False


def _lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines that hold something, with their numbers."""
    text = read_text(path, "The preference file")
    return [(number, line) for number, line in enumerate(lines_of(text), start=1) if line.strip()]


class AnswerFile:
    """The preference file of somebody who asks: what was answered before a crash is not asked again."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def get(self, keys: Sequence[str], sizes: Sequence[int]) -> list[Preference] | None:
        """The newest answer under each key; None where there is not one for every key.

        Lines that a crash cut short, or that do not fit groups of these sizes, do not count.
        """
        found = self.known(keys, sizes)
        return [found[key] for key in keys] if len(found) == len(set(keys)) else None

    def known(self, keys: Sequence[str], sizes: Sequence[int]) -> dict[str, Preference]:
        """The newest answers under those of the keys that have one; a taste's never takes the place of a person's."""
        wanted, found = dict(zip(keys, sizes, strict=True)), dict[str, Preference]()
        for preference in self.all():
            older = found.get(preference.key)
            if wanted.get(preference.key) == len(preference.images) and not (preference.by and older and not older.by):
                found[preference.key] = preference
        return found

    def all(self) -> Iterator[Preference]:
        """Every line that can be read, in order."""
        for line in lines_of(self._read()):
            with contextlib.suppress(UserError):
                yield Preference.of(parse_json(line, "The line"))

    def put(self, preferences: Sequence[Preference]) -> None:
        """Adds answers; they are on the disk when this returns. Raises UserError for what the system refuses."""
        lines = "".join(preference.line() for preference in preferences)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = self._read()
            torn = bool(before) and not before.endswith("\n")
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + lines if torn else lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"Cannot write {self.path}: {reason(error)}.") from error

    def _read(self) -> str:
        return self.path.read_text("utf-8", errors="replace") if self.path.exists() else ""
