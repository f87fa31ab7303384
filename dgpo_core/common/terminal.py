"""What is printed: names of files, prompts and servers' sentences come from outside and must not steer the terminal.

Nor does it end the work: terminals are closed, `tee` dies of the same Ctrl-C, and disks that logs are on run full.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

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


@contextmanager
def talking() -> Iterator[None]:
    """Inside, printing never fails: what an encoding cannot show is written as escapes, and what nobody takes any more
    is dropped."""
    streams = sys.stdout, sys.stderr
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (cast(TextIO, stream and _Dropping(stream)) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            _finish(stream)


class _Dropping:
    """A stream that drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of a stream that has taken it."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """What is waiting stays so where it cannot be written."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _finish(stream: TextIO | None) -> None:
    """Writes what is waiting. Where that fails, the interpreter need not try it again and end with exit code 120."""
    try:
        if stream:
            stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError):  # it is no file of the system
            os.dup2(nowhere, stream.fileno() if stream else nowhere)
        os.close(nowhere)
