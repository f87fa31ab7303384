"""Prompt files, and which prompts an iteration trains on."""

import functools
import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompt_syntax import is_infotext_line
from dgpo_core.common.reading import kind_at, lines_of, parse_json, read_bytes, shown
from dgpo_core.common.seeds import derive_seed
from dgpo_core.common.source import Source, below

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x1f]")  # those that neither end a line nor move along it


@dataclass(frozen=True)
class Prompt:
    """What the model is asked to draw, and what a verifying reward needs to know about it.

    where: file and line that it is from, for messages; "" where it is from none. sources: the pictures that it is
    about, for models that edit; most prompts have none.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    where: str = field(default="", compare=False)
    sources: tuple[Source, ...] = ()


def load_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a .txt file (one per line) or a .jsonl file (`{"prompt": ..., metadata...}` per line).

    In .jsonl, "image" (a path) or "images" (a list of paths) are the prompt's sources: pictures beside the file or in
    folders below it. Blank lines, and in .txt lines that start with #, are skipped. Raises UserError naming the file,
    and the line, for whatever is wrong with it.
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise UserError(f"The prompt file {shown(path)} must be a .txt or .jsonl file.")
    read = functools.partial(_read_json, folder=path.parent) if path.suffix.lower() == ".jsonl" else _read_text
    prompts = _read_lines(lines_of(_text_of(path)), read, f"{path}:")
    if not prompts:
        raise UserError(f"The prompt file {shown(path)} has no prompts in it.")
    return prompts


def read_prompts(text: str) -> list[Prompt]:
    """The prompts of a text, one per line; as in a .txt file. Raises UserError naming the line."""
    prompts = _read_lines(lines_of(text), _read_text, "line ")
    if not prompts:
        raise UserError("There are no prompts in the text: write one per line.")
    return prompts


def _read_lines(lines: Sequence[str], read: Callable[[str, str], Prompt | None], where: str) -> list[Prompt]:
    """The prompts of those lines that hold one. where: what a line's number stands behind."""
    prompts = [read(line.strip(), f"{where}{number}") for number, line in enumerate(lines, 1) if line.strip()]
    written = [prompt for prompt in prompts if prompt is not None]
    for prompt in written:
        refuse_foreign(prompt)
    return written


def digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    """The same for the same prompts in the same order, with their metadata and pictures, wherever they are from."""
    rows = [[prompt.text, prompt.metadata, [source.key for source in prompt.sources]] for prompt in prompts]
    content = json.dumps(rows, sort_keys=True, default=str).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def refuse_foreign(prompt: Prompt) -> None:
    """Raises UserError for what cannot be a prompt that somebody has written."""
    if _CONTROL.search(prompt.text):
        raise UserError(f"{_where(prompt)}: holds a control character: save the prompts as UTF-8 text.")
    foreign = next((line for line in prompt.text.splitlines() if is_infotext_line(line)), None)
    if foreign is not None:
        raise UserError(
            f"{_where(prompt)}: {shown(foreign, 60)!r} is no prompt but a part of generation data that were copied:"
            " keep the prompts alone, one per line."
        )


def _where(prompt: Prompt) -> str:
    where = shown(prompt.where, 1000) or "the prompt"
    return where[:1].upper() + where[1:] if where.startswith(("line ", "the ")) else where


def _text_of(path: Path) -> str:
    if not kind_at(path, "The prompt file"):
        raise UserError(f"There is no prompt file {shown(path, 1000)}.")
    content = read_bytes(path, "The prompt file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{shown(path)}:{line}: not UTF-8 text; save the file as UTF-8.") from None


def _read_text(line: str, where: str) -> Prompt | None:
    return None if line.startswith("#") else Prompt(line, where=where)


def _read_json(line: str, where: str, folder: Path) -> Prompt:
    record = parse_json(line, f"{where}: the line")
    if not isinstance(record, dict):
        raise UserError(f'{where}: must be an object such as {{"prompt": "a red circle"}}.')
    text = record.pop("prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: "prompt" must be there and hold text.')
    names = _source_names(record, where)
    return Prompt(text.strip(), record, where, tuple(Source.of_file(folder / name, where) for name in names))


def _source_names(record: dict[str, Any], where: str) -> list[str]:
    """The paths in "image" or "images", which are then no metadata any more."""
    given = [record.pop(key) for key in ("image", "images") if record.get(key) is not None]
    if len(given) > 1:
        raise UserError(f'{where}: has both "image" and "images": keep one of them.')
    names = given[0] if given and isinstance(given[0], list) else given
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f'{where}: "image" must be the path of a picture, "images" a list of paths.')
    return [below(name, where, "prompt file") for name in names]


Item = TypeVar("Item")


class PromptStream(Generic[Item]):
    """The prompts, or what else is trained on, of each iteration: all of them in random order, then again in another
    order, without end.

    None comes twice within one round. What `at` answers depends only on its argument and on what the stream was
    made from, so a resumed run needs no state. The order of the last rounds asked for is remembered: an iteration costs
    what its own prompts cost, however many there are in all.
    """

    def __init__(self, prompts: Sequence[Item], per_iteration: int, seed: int) -> None:
        self.prompts = tuple(prompts)
        self.per_iteration = per_iteration
        self.seed = seed

    def at(self, iteration: int) -> list[Item]:
        """The `per_iteration` prompts of `iteration`, counted from 0."""
        first = iteration * self.per_iteration
        return [self.prompts[self.number(turn)] for turn in range(first, first + self.per_iteration)]

    def number(self, turn: int) -> int:
        """Which of `prompts` has this turn, counted from 0."""
        epoch, place = divmod(turn, len(self.prompts))
        return _order(len(self.prompts), self.seed, epoch)[place]


@functools.lru_cache(maxsize=4)  # of a million prompts, 8 MB each
def _order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` prompts in round `epoch`."""
    order = list(range(count))
    random.Random(derive_seed(seed, "prompts", epoch)).shuffle(order)
    return order
