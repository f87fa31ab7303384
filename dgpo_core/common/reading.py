"""Reading what somebody else may have written: every text, JSON and YAML file comes in through here, within bounds.

A file that is shared (settings, a workflow, a picture's metadata, a table of ratings) can be damaged, or made to do
harm: endless, nested without end, a few lines that stand for billions. What passes here is small enough, flat enough
and clean enough that nothing behind it needs to ask again. Every problem is a UserError of one sentence.
"""

import io
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import reason

MOST_BYTES = 64 * 2**20
"""Of a text file. A million prompts are less."""
MOST_DEPTH = 64
"""Levels of nesting. Workflows with subgraphs have about twenty."""
MOST_VALUES = 2_000_000
"""Values in all, each counted as often as it is referred to."""
MOST_MERGES, MOST_MERGED = 1000, 10_000
"""Merge keys (<<) of a YAML file, and entries of one mapping with what they bring in."""
LARGEST = 2**64
"""Of whole numbers; ComfyUI's seeds reach it."""


def read_bytes(path: str | Path, what: str, most: int = MOST_BYTES) -> bytes:
    """An ordinary file's content. `what` begins the sentence: "The prompt file".

    Raises UserError where there is none, where it cannot be read, is larger than `most` bytes, or is no ordinary file:
    a pipe or a device could be waited on for ever.
    """
    try:
        # without O_NONBLOCK, opening a pipe that nobody writes to would not return
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{what} {shown(path)} cannot be read: it is {_kind(status.st_mode)}.")
            content = file.read(most + 1) if status.st_size <= most else None
    except FileNotFoundError:
        raise UserError(f"{what} {shown(path)} does not exist.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{what} {shown(path)} cannot be read: {_why(path, error)}.") from None
    if content is None or len(content) > most:
        raise UserError(f"{what} {shown(path)} is too large: more than {most // 2**20} MB.")
    return content


def require_ordinary(path: str | Path, what: str) -> None:
    """Raises UserError for what is there but is no ordinary file, for those who hand the path to another reader."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # the reader tells
        return
    if not stat.S_ISREG(mode):
        raise UserError(f"{what} {shown(path)} cannot be read: it is {_kind(mode)}.")


def kind_at(path: str | Path, what: str) -> Literal["file", "folder", "other", ""]:
    """What is at a path that somebody has given; "" for nothing.

    `what` begins the sentence: "The prompt file". Raises UserError for what cannot be looked at, where `Path.exists`
    raises what the system says: what is in somebody else's folder, a name that is too long.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{what} {shown(path)} cannot be read: {reason(error)}.") from None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def _kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "no ordinary file"


def _why(path: str | Path, error: Exception) -> str:
    return "it is a folder" if os.path.isdir(path) else reason(error)


def read_text(path: str | Path, what: str, most: int = MOST_BYTES) -> str:
    """An ordinary UTF-8 file, a byte-order mark aside. Raises UserError as `read_bytes`, and for another encoding."""
    try:
        return read_bytes(path, what, most).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{what} {shown(path)} is not UTF-8 text: save it as UTF-8.") from None


def lines_of(text: str) -> list[str]:
    """The lines of a text, as every file and every box of prompts, choices and answers is split.

    Line feeds and carriage returns end a line. U+2028, U+2029, U+0085 and form feeds do not, which `str.splitlines`
    takes for ends as well: they come with texts that are pasted, and JSON writes them as they are.
    """
    return io.StringIO(text, newline=None).read().split("\n")


def read_json(path: str | Path, what: str, most: int = MOST_BYTES) -> Any:
    """A JSON file. Raises UserError as `read_text` and `parse_json`."""
    return parse_json(read_text(path, what, most), f"{what} {shown(path)}")


def parse_json(text: str | bytes, what: str) -> Any:
    """JSON within the bounds above; of keys that are given twice in one object, the last counts.

    `what` begins the sentence: "The metadata of a.safetensors". Raises UserError.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{what} cannot be read: it is nested too deeply.") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a number of more digits than Python reads
        raise UserError(f"{what} is not valid JSON: {_line(error)}.") from None
    return bounded(value, what)


def parse_yaml(text: str, what: str) -> Any:
    """YAML within the bounds above, without tags, and with dates as the text that stands there.

    `what` begins the sentence: "The settings file my.yaml". Raises UserError, also for a key that is given twice.
    """
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise UserError(f"{what} cannot be read: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        # besides yaml's own: 5,000 digits, keys that cannot be keys, and tags on what they do not fit
        raise UserError(f"{what} is not valid YAML: {_line(error)}.") from None
    return bounded(value, what)


def bounded(value: Any, what: str) -> Any:
    """The value as it is. Raises UserError where it is beyond the bounds above, or holds half a character."""
    waiting: list[tuple[Any, int]] = [(value, 1)]
    count = 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if count > MOST_VALUES:
            raise UserError(f"{what} cannot be read: it stands for more than {MOST_VALUES:,} values.")
        if depth > MOST_DEPTH:
            raise UserError(f"{what} cannot be read: it is nested more than {MOST_DEPTH} levels deep.")
        if isinstance(item, str):
            _whole_characters(item, what)
        elif isinstance(item, int) and abs(item) > LARGEST:
            raise UserError(f"{what} cannot be read: it holds a whole number of {len(str(abs(item)))} digits.")
        elif isinstance(item, Mapping):
            waiting.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list | tuple):
            waiting.extend((part, depth + 1) for part in item)
        elif item is not None and not isinstance(item, int | float):
            raise UserError(f"{what} cannot be read: it holds {type(item).__name__}, not text, numbers and lists.")
    return value


def _whole_characters(text: str, what: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{what} holds half a character (a lone surrogate): {shown(text)}.") from None


def shown(value: Any, most: int = 200) -> str:
    """A text from outside for a sentence or a terminal: in one line, at most `most` characters, no control codes.

    What a terminal would act on (escape sequences), what reorders text, and half characters are written as escapes.
    """
    text = str(value)
    text = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _line(error: Exception) -> str:
    """A parser's complaint in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    where = f" in line {mark.line + 1}" if mark else ""
    return shown(" ".join(problem.split()).rstrip(".")) + where


class _Loader(yaml.SafeLoader):
    """YAML as settings need it: a date is a text, a key stands once."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - yaml's own way
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    merges = 0

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Each mapping as it is written, before merge keys bring in others."""
        node = super().compose_mapping_node(anchor)
        twice = _first_repeated(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{shown(twice, 60)} is given twice", node.start_mark)
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        self.merges += sum(len(value.value) if isinstance(value, yaml.SequenceNode) else 1 for value in merged)
        if self.merges > MOST_MERGES:
            raise yaml.constructor.ConstructorError(None, None, "there are too many merge keys", node.start_mark)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_MERGED:  # a few lines that merge each other twice stand for billions
            raise yaml.constructor.ConstructorError(None, None, "merge keys bring in too much", node.start_mark)


def _first_repeated(keys: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    return None
