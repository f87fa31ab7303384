"""Asking a person about groups of images, once: what was answered before is not asked again."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import reason, write_atomic
from dgpo_core.common.group import Group
from dgpo_core.common.pictures import to_pil
from dgpo_core.people.preference_file import AnswerFile
from dgpo_core.people.questions import Answer, AskedGroup, Question, Questions

FOLDER = "asked"
"""The folder of a run that holds the images which somebody was asked about and, in `FILE`, the answers."""
FILE = "answers.jsonl"


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
) -> Answer | None:
    """The answer in the folder's file, else a person's, which is then saved before it counts; None: nobody in time.

    keys: one for each group, the same whenever the same is asked. mode, pairs: see `Question`. shown: what a browser
    needs of an image besides its file's name. timeout_s, check: see `Questions.ask`. skip: who does not answer in time
    has skipped all groups, which is saved as well. Raises UserError where the folder cannot be written.
    """
    known = answered(folder, keys, [len(group) for group in groups])
    if known:
        return known
    file = AnswerFile(folder / FILE)
    asked = tuple(
        AskedGroup(group.prompt.text, tuple({"filename": name, **(shown or {})} for name in _save(group, folder, key)))
        for group, key in zip(groups, keys, strict=True)
    )
    answer = questions.ask(
        Question(asker, asked, mode, pairs), timeout_s, check, lambda answer: file.put(answer.preferences(asked, keys))
    )
    if answer is None and skip:
        answer = Answer.nothing(len(asked))
        file.put(answer.preferences(asked, keys))
    return answer


def answered(folder: Path, keys: Sequence[str], sizes: Sequence[int]) -> Answer | None:
    """What was said before about groups of these sizes, by their keys; None where something is still to be asked."""
    known = AnswerFile(folder / FILE).get(keys, sizes)
    return Answer(tuple(preference.answer for preference in known)) if known else None


def _save(group: Group, folder: Path, name: str) -> list[str]:
    """Writes the images as name-0.png and so on; their names."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make the folder {folder}: {reason(error)}.") from error
    names = [f"{name}-{i}.png" for i in range(len(group))]
    for file, image in zip(names, group.images, strict=True):
        write_atomic(folder / file, functools.partial(to_pil(image).save, compress_level=1))
    return names
