"""What is printed: names of files, prompts and servers' sentences come from outside and must not steer the terminal."""

import sys

from tqdm import tqdm

from dgpo_core.common.reading import shown

LONGEST_LINE = 2000  # characters


def say(text: str) -> None:
    """Prints lines, above a progress bar that is there, without anything that a terminal would act on."""
    tqdm.write(_clean(text))


def note(text: str) -> None:
    """Prints lines to stderr, as clean as `say` does."""
    print(_clean(text), file=sys.stderr)


def _clean(text: str) -> str:
    return "\n".join(shown(line, LONGEST_LINE) for line in text.split("\n"))
