"""Asking a person about groups of images, once: what was answered before is not asked again."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import reason, write_atomic
from dgpo_core.common.group import Group
from dgpo_core.common.pictures import to_pil
from dgpo_core.people.apprentice import ANSWERS, Apprentice
from dgpo_core.people.preference_file import AnswerFile, Preference
from dgpo_core.people.questions import Answer, AskedGroup, Question, Questions
from dgpo_core.settings.config import TASTE

FOLDER = "asked"
"""The folder of a run that holds the images which somebody was asked about and, in `ANSWERS`, the answers."""


def ask(
    questions: Questions,
    groups: Sequence[Group],
    keys: Sequence[str],
    folder: Path,
    asker: Mapping[str, str],
    *,
    mode: str,
    pairs: int,
    timeout_s: float,
    check: Callable[[], None],
    shown: Mapping[str, str] | None = None,
    skip: bool = False,
    apprentice: Apprentice | None = None,
) -> Answer | None:
    """The answer in the folder's file, else a person's, which is then saved before it counts; None: nobody in time.

    keys: one for each group, the same whenever the same is asked. mode, pairs: see `Question`. shown: what a browser
    needs of an image besides its file's name. timeout_s, check: see `Questions.ask`. skip: who does not answer in time
    has skipped all groups, which is saved as well. apprentice: answers the groups that it is sure of; without one, who
    is asked about one group is asked about all. Raises UserError where the folder cannot be written.
    """
    file, sizes = AnswerFile(folder / ANSWERS), [len(group) for group in groups]
    before = answered(folder, keys, sizes)
    if before:
        return before
    known = file.known(keys, sizes)
    rows = list(range(len(groups)))
    if apprentice:
        rows = [i for i, key in enumerate(keys) if key not in known]
        plan = apprentice.plan([groups[i] for i in rows], [keys[i] for i in rows])
        file.put([_by_taste(groups[rows[i]], keys[rows[i]], said) for i, said in plan.said.items()])
        rows = [rows[i] for i in plan.ask]
    if rows:
        asked = tuple(_asked(groups[i], keys[i], folder, shown or {}) for i in rows)
        mine = [keys[i] for i in rows]

        def save(answer: Answer) -> None:
            lines = answer.preferences(asked, mine)
            if apprentice:
                agreed = [apprentice.agreed(key, said) for key, said in zip(mine, answer.groups, strict=True)]
                lines = [replace(line, agreed=share) for line, share in zip(lines, agreed, strict=True)]
            file.put(lines)

        answer = questions.ask(Question(asker, asked, mode, pairs), timeout_s, check, save)
        if answer is None and not skip:
            return None
        if answer is None:
            file.put(Answer.nothing(len(asked)).preferences(asked, mine))
    known = file.known(keys, sizes)
    return Answer(tuple(known[key].answer for key in keys))


def _asked(group: Group, key: str, folder: Path, shown: Mapping[str, str]) -> AskedGroup:
    """The group with its images, and the pictures that they are made of, in the folder."""
    images = _save(zip(_names(group, key), group.images, strict=True), folder)
    sources = _save(((f"{key}-source-{i}.png", source) for i, source in enumerate(group.sources)), folder)
    files = [tuple({"filename": name, **shown} for name in names) for names in (images, sources)]
    return AskedGroup(group.prompt.text, *files)


def _by_taste(group: Group, key: str, answer: Mapping[str, Any]) -> Preference:
    """The line of a group that nobody was asked about: its pictures are not kept."""
    return Preference(group.prompt.text, tuple(_names(group, key)), answer, key, by=TASTE)


def _names(group: Group, key: str) -> list[str]:
    return [f"{key}-{i}.png" for i in range(len(group))]


def answered(folder: Path, keys: Sequence[str], sizes: Sequence[int]) -> Answer | None:
    """What was said before about groups of these sizes, by their keys; None where something is still to be asked."""
    known = AnswerFile(folder / ANSWERS).get(keys, sizes)
    return Answer(tuple(preference.answer for preference in known)) if known else None


def _save(images: Iterable[tuple[str, Tensor]], folder: Path) -> list[str]:
    """Writes the images under their names; the names."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make the folder {folder}: {reason(error)}.") from error
    names = []
    for name, image in images:
        write_atomic(folder / name, functools.partial(to_pil(image).save, compress_level=1))
        names.append(name)
    return names
