"""Ctrl-C, and what else asks a run to end: noticed between two forwards."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dgpo_core.common.errors import Interrupted

ECHO = 5.0  # seconds in which a second signal is still the first one, passed on by `accelerate launch` or `torchrun`


@dataclass
class Stop:
    """Ctrl-C, noticed at the next forward instead of in the middle of one."""

    asked: float | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGINT and SIGTERM raise the flag; another one, `ECHO` seconds later or more, acts at once."""

        def note(number: int, frame: Any) -> None:
            now = time.monotonic()
            if self.asked is not None and now > self.asked + ECHO:
                raise KeyboardInterrupt
            self.asked = self.asked or now

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted once the flag is up."""
        if self.asked is not None:
            raise Interrupted
