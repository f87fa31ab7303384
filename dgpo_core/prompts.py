"""Writes prompts for the rewards that check facts: seeded, own sets to train on and to measure with.

    python -m dgpo_core.prompts geneval --count 150 --out held_out.jsonl
    python -m dgpo_core.prompts geneval --count 700 --exclude held_out.jsonl --out train.jsonl

`geneval`: for the rewards geneval and geneval_training. `ocr`: for the reward ocr.
"""

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import write_atomic
from dgpo_core.common.prompts import Prompt, load_prompts
from dgpo_core.common.reading import shown
from dgpo_core.common.seeds import derive_seed
from dgpo_core.rewards.geneval import prompts as geneval_prompts
from dgpo_core.rewards.ocr import prompts as ocr_prompts
from dgpo_core.settings.command_line import command, parse

PROGRAM = "python -m dgpo_core.prompts"
MOST = 1_000_000


@dataclass(frozen=True)
class GenEvalSet:
    """Writes prompts of GenEval's six tasks over COCO's objects, with the facts that the rewards check."""

    count: int
    """How many: to about 850 over all files in the proportions of Flow-GRPO; beyond that, counting runs out."""
    out: str
    """The .jsonl file to write; there must be none of this name."""
    seed: int = 0
    """The same seed gives the same prompts."""
    exclude: tuple[str, ...] = ()
    """Prompt files: nothing that a .jsonl with GenEval's facts asks for is asked for, in other words or another order
    either; of a .txt, which has no facts, only the same words are left out, and that is told."""


@dataclass(frozen=True)
class OcrSet:
    """Writes prompts that quote a text, for the reward ocr."""

    count: int
    """How many."""
    out: str
    """The .jsonl file to write; there must be none of this name."""
    letters: tuple[int, int] = (4, 24)
    """Shortest and longest text, in letters without spaces, 3 to 60."""
    seed: int = 0
    """The same seed gives the same prompts."""
    exclude: tuple[str, ...] = ()
    """Prompt files (.txt, .jsonl): no text that they quote is quoted."""


def write_geneval(options: GenEvalSet) -> str:
    """Writes the set; returns what was written, in one line."""
    _check(options.count, options.out)
    excluded = _prompts_of(options.exclude)
    free = _unlike(excluded, geneval_prompts.meaning)
    prompts = geneval_prompts.draw(options.count, _generator("geneval", options.seed), free)
    _write(options.out, prompts)
    tasks = Counter(prompt.metadata["tag"] for prompt in prompts)
    listed = ", ".join(f"{n} {tag}" for tag, n in tasks.most_common())
    return f"{options.out}: {len(prompts)} prompts ({listed}){_without_facts(excluded)}"


def _without_facts(excluded: Sequence[Prompt]) -> str:
    """What is to be told of excluded prompts that say nothing of what they ask for."""
    count = sum(geneval_prompts.meaning(prompt) is None for prompt in excluded)
    if not count:
        return ""
    return (
        f"; {count} of the {len(excluded)} prompts of --exclude have no facts of GenEval's, so that only their words"
        " are left out: the same may be asked for in other words or another order (give the .jsonl that has the facts)"
    )


def write_ocr(options: OcrSet) -> str:
    """Writes the set; returns what was written, in one line."""
    _check(options.count, options.out)
    free = _unlike(_prompts_of(options.exclude), ocr_prompts.meaning)
    prompts = ocr_prompts.draw(options.count, options.letters, _generator("ocr", options.seed), free)
    _write(options.out, prompts)
    low, high = options.letters
    return f"{options.out}: {len(prompts)} prompts with texts of {low} to {high} letters"


def _check(count: int, out: str) -> None:
    if not 1 <= count <= MOST:
        raise UserError(f"--count must be 1 to {MOST:,}, not {count:,}.")
    if Path(out).suffix.lower() != ".jsonl":
        raise UserError(f"--out must name a .jsonl file, not {shown(repr(out))}.")
    if os.path.lexists(out):
        raise UserError(f"There is already a file {shown(out)}: give another name to --out, or delete it.")


def _prompts_of(files: Sequence[str]) -> list[Prompt]:
    return [prompt for file in files for prompt in load_prompts(file)]


def _unlike(others: Sequence[Prompt], meaning: Callable[[Prompt], Hashable]) -> Callable[[Prompt], bool]:
    """Whether a prompt is none of the others, neither by its words nor by what it asks for."""
    words = {_words(prompt) for prompt in others}
    meanings = {meaning(prompt) for prompt in others}
    return lambda prompt: _words(prompt) not in words and meaning(prompt) not in meanings


def _words(prompt: Prompt) -> str:
    return " ".join(prompt.text.casefold().split())


def _generator(kind: str, seed: int) -> random.Random:
    return random.Random(derive_seed("prompt sets", kind, seed))


def _write(path: str, prompts: Sequence[Prompt]) -> None:
    lines = [json.dumps({"prompt": prompt.text, **prompt.metadata}, ensure_ascii=False) + "\n" for prompt in prompts]
    write_atomic(path, "".join(lines))


def run(argv: Sequence[str]) -> str:
    """What the arguments ask for; returns the line to print. Raises UserError for anything wrong with them."""
    kind, rest = (argv[0], argv[1:]) if argv else ("", [])
    if kind == "geneval":
        return write_geneval(parse(GenEvalSet, rest, f"{PROGRAM} geneval", GenEvalSet.__doc__))
    if kind == "ocr":
        return write_ocr(parse(OcrSet, rest, f"{PROGRAM} ocr", OcrSet.__doc__))
    if kind in ("-h", "--help"):
        return f"{__doc__.strip()}\n\n{PROGRAM} geneval --help and {PROGRAM} ocr --help say more."
    asked = f"There are no prompts for {shown(repr(kind))}" if kind else "Nothing says for which reward"
    raise UserError(f"{asked}: begin with geneval or ocr, as in {PROGRAM} geneval --count 500 --out prompts.jsonl.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    return command(lambda: list(sys.argv[1:] if argv is None else argv), lambda given: print(run(given)))


if __name__ == "__main__":
    sys.exit(main())
