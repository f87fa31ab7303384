"""Prompt files, and which prompts an iteration trains on."""

import functools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgpo_core.errors import UserError
from dgpo_core.seeds import derive_seed


@dataclass(frozen=True)
class Prompt:
    """What the model is asked to draw, and what a verifying reward needs to know about it."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


def load_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a .txt file (one per line) or a .jsonl file (`{"prompt": ..., metadata...}` per line).

    Blank lines, and in .txt lines that start with #, are skipped. Raises UserError naming the file, and the line, for
    whatever is wrong with it.
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise UserError(f"The prompt file {path} must be a .txt or .jsonl file.")
    read = _read_json if path.suffix.lower() == ".jsonl" else _read_text
    lines = enumerate(_text_of(path).split("\n"), start=1)
    prompts = [read(line.strip(), f"{path}:{number}") for number, line in lines if line.strip()]
    found = [prompt for prompt in prompts if prompt is not None]
    if not found:
        raise UserError(f"The prompt file {path} has no prompts in it.")
    return found


def read_prompts(text: str) -> list[Prompt]:
    """The prompts of a text, one per line; as in a .txt file."""
    found = [_read_text(line.strip(), "") for line in text.splitlines() if line.strip()]
    prompts = [prompt for prompt in found if prompt is not None]
    if not prompts:
        raise UserError("There are no prompts in the text: write one per line.")
    return prompts


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"There is no prompt file {path}.") from None
    except IsADirectoryError:
        raise UserError(f"The prompt file {path} is a folder; give a .txt or .jsonl file.") from None
    except OSError as error:
        raise UserError(f"The prompt file {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8.") from None


def _read_text(line: str, where: str) -> Prompt | None:
    return None if line.startswith("#") else Prompt(line)


def _read_json(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from None
    if not isinstance(record, dict):
        raise UserError(f'{where}: must be an object such as {{"prompt": "a red circle"}}.')
    text = record.pop("prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: "prompt" must be there and hold text.')
    return Prompt(text.strip(), record)


class PromptStream:
    """The prompts of each iteration: all of them in random order, then again in another order, without end.

    No prompt comes twice within one round. What `at` answers depends only on its argument and on what the stream was
    made from, so a resumed run needs no state. The order of the last rounds asked for is remembered: an iteration costs
    what its own prompts cost, however many there are in all.
    """

    def __init__(self, prompts: Sequence[Prompt], per_iteration: int, seed: int) -> None:
        self.prompts = tuple(prompts)
        self.per_iteration = per_iteration
        self.seed = seed

    def at(self, iteration: int) -> list[Prompt]:
        """The `per_iteration` prompts of `iteration`, counted from 0."""
        first, count = iteration * self.per_iteration, len(self.prompts)
        places = [divmod(position, count) for position in range(first, first + self.per_iteration)]
        return [self.prompts[_order(count, self.seed, epoch)[place]] for epoch, place in places]


@functools.lru_cache(maxsize=4)  # of a million prompts, 8 MB each
def _order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` prompts in round `epoch`."""
    order = list(range(count))
    random.Random(derive_seed(seed, "prompts", epoch)).shuffle(order)
    return order
