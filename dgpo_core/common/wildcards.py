"""Prompts that stand for many: `{red|blue}`, and `__colour__` for a line of the file colour.txt.

What is drawn is fixed when the prompts are read, so that all that comes after (the order, what is encoded once, what is
kept on disk, a resumed run) sees prompts as any others.
"""

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompt_syntax import PYTHON_NAMES
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.reading import kind_at, lines_of, read_text, shown
from dgpo_core.common.seeds import derive_seed
from dgpo_core.common.suggest import suggest

TEMPLATE = "template"
"""In the metadata of a drawn prompt: the text that it was drawn from."""
_MOST_PICKS = 1000  # of one text; a file that names itself never ends
_MOST_BYTES = 4 * 2**20
_FILE = re.compile(rf"(?<!\w)__((?!(?:{PYTHON_NAMES})__)[^\W_][\w\-/.*]{{0,80}}?)__(?!\w)")
_MARK = r"\\(?:[{}|]|(?![{}|]))"  # one that means itself, or a backslash alone
_CHOICE = re.compile(rf"(?<!\\)\{{((?:[^{{}}|\\]|{_MARK})*\|(?:[^{{}}\\]|{_MARK})*)\}}")  # an innermost one
_BAR = re.compile(r"(?<!\\)\|")
_SHARE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)::(.*)", re.DOTALL)
_ESCAPED = re.compile(r"\\([{}|])")
_SEVERAL = re.compile(
    r"(?<!\\)\{\s*(?:\d+(?:-\d*)?|-\d+)\$\$[^{}]{0,60}\}?"
)  # Dynamic Prompts' {2$$red|blue}, {1-2$$...}
_VARIABLE = re.compile(r"\$\{\s*[A-Za-z_][\w\-]*\s*(?:\}|[=:][^{}]{0,60})")  # its ${hue=!{red|blue}}, ${hue}
_READ = (_FILE, _CHOICE, _ESCAPED, _SEVERAL, _VARIABLE)


def drawn(prompts: Sequence[Prompt], count: int, seed: int, folder: Path) -> list[Prompt]:
    """Of each prompt that stands for many, up to `count` that differ, in its place; the others as they are.

    In `{a|b}` each choice is as likely as the others, `{3::a|b}` takes a three times as often; choices may hold choices
    and files. `\\{`, `\\|` and `\\}` mean themselves, in every prompt. `folder` holds the files: a choice a line, with
    its share or without, lines that start with # are none. A pure function of its arguments and of the files. Raises
    UserError for a file that is not there, for shares of which none can be drawn, for what never ends, and for what
    means something else in Dynamic Prompts: several choices of one, and variables.
    """
    found: list[Prompt] = []
    for place, prompt in enumerate(prompts):
        own = derive_seed(seed, "wildcards", place)
        read = any(pattern.search(prompt.text) for pattern in _READ)
        found += _of(prompt, count, own, folder) if read else [prompt]
    return found


def _of(prompt: Prompt, count: int, seed: int, folder: Path) -> Iterator[Prompt]:
    texts = (draw(prompt.text, random.Random(derive_seed(seed, "text", k)), folder, prompt.where) for k in range(count))
    metadata = {**prompt.metadata, TEMPLATE: prompt.text}
    return (replace(prompt, text=text, metadata=metadata) for text in dict.fromkeys(texts))


def draw(text: str, rng: random.Random, folder: Path, where: str = "") -> str:
    """One of the texts that `text` stands for. where: what it is from, for messages."""
    at = shown(where, 1000) or "the prompt"
    for _ in range(_MOST_PICKS):
        _refuse_others(text, at)
        if found := _FILE.search(text):
            picked = _line(folder, found[1], rng, at)
        elif found := _CHOICE.search(text):
            picked = _picked(_BAR.split(found[1]), rng, at, shown(found[0], 60))
        else:
            return _settled(text, at)
        text = f"{text[: found.start()]}{picked}{text[found.end() :]}"
    raise UserError(
        f"At {at}, a wildcard names itself, so that its text has no end: look at its file in {shown(folder)}."
    )


def _refuse_others(text: str, at: str) -> None:
    """Raises UserError for what another program draws otherwise, before it is drawn as words here."""
    if found := _SEVERAL.search(text):
        raise UserError(
            f"At {at}, {shown(found[0], 60)!r} asks for several choices at once, which is not drawn here: write a"
            " choice for each, as in {red|blue} {red|blue}."
        )
    if found := _VARIABLE.search(text):
        raise UserError(
            f"At {at}, {shown(found[0], 60)!r} is a variable, and there are none here: write what it stands for in its"
            " place, a choice such as {red|blue} or a __file__, or $\\{ for these characters themselves."
        )


def _settled(text: str, at: str) -> str:
    """With nothing left to choose: the marks that mean themselves, and no gaps where a choice was empty."""
    text = " ".join(_ESCAPED.sub(r"\1", text).split())
    if not text:
        raise UserError(f"At {at}, the choices may all be empty, and so the prompt: put a word beside them.")
    return text


def _picked(choices: Sequence[str], rng: random.Random, at: str, among: str) -> str:
    """One by its share, without it. among: what holds the choices, for messages."""
    shares = [_SHARE.fullmatch(choice) for choice in choices]
    texts = [share[2] if share else choice for share, choice in zip(shares, choices, strict=True)]
    weights = [float(share[1]) if share else 1.0 for share in shares]
    if not any(weights):
        raise UserError(f"At {at}, no choice in {among} is ever drawn: give one a share above 0.")
    if not math.isfinite(sum(weights)):
        raise UserError(f"At {at}, the shares in {among} are too large to count: write smaller ones.")
    (picked,) = rng.choices(texts, weights)
    return picked


def _line(folder: Path, name: str, rng: random.Random, at: str) -> str:
    lines = _lines(folder, name, at)
    if any(map(_SHARE.fullmatch, lines)):
        return _picked(lines, rng, at, f"the wildcard file {shown(folder / f'{name}.txt')}")
    return rng.choice(lines)  # another draw than by equal shares: a seed keeps its texts


def _lines(folder: Path, name: str, at: str) -> list[str]:
    """The choices in a file. Raises UserError where there is none, or none in it."""
    if PurePosixPath(name).is_absolute() or ".." in PureWindowsPath(name).parts:
        raise UserError(f"At {at}, the wildcard __{shown(name)}__ is outside of the folder {shown(folder)}.")
    path = folder / f"{name}.txt"
    if kind_at(path, "The wildcard file") != "file" or folder.resolve() not in path.resolve().parents:
        known = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.txt"))
        instead = suggest(name, known) if known else ": put it there, one choice a line."
        raise UserError(f"At {at}, there is no file for the wildcard __{name}__ in {shown(folder)}{instead}")
    lines = lines_of(read_text(path, "The wildcard file", _MOST_BYTES))
    choices = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not choices:
        raise UserError(f"The wildcard file {shown(path)} has no line to choose: write one choice a line.")
    return choices
