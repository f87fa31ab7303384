"""Word from the other processes of a run: one that fails says why, and one that is killed is missed at once.

Every process has a connection to every other one on which it waits for the one message that the other sends when it
leaves. The system closes the connections of a process that dies, so nothing has to be sent in the meantime, and nobody
is taken for dead who is only slow.
"""

import contextlib
import datetime
import threading
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist

from dgpo_core.common.errors import Diverged, Elsewhere, Interrupted, UserError, out_of_memory

FOR_EVER = datetime.timedelta(days=3650)
"""How long one process waits for another: the connection tells of one that died, and a slow one is waited for."""
LENGTH = 4096  # bytes of the message, padded
SOON = 10.0  # seconds in which the reason for a broken connection arrives

DONE, STOPPED, FAILED, DIVERGED, FOLLOWED, GONE = "done", "stopped", "failed", "diverged", "followed", "gone"


@dataclass(frozen=True)
class News:
    """How process `rank` left: `DONE`, `STOPPED` by the user, `FAILED` and why, `DIVERGED` likewise, `FOLLOWED`
    one that did, or `GONE` without a word."""

    rank: int
    how: str
    why: str = ""

    def error(self, size: int) -> BaseException:
        """What it means for this process, of `size`."""
        if self.how == STOPPED:
            return Interrupted()
        if self.how in (FAILED, DIVERGED):
            kind = Diverged if self.how == DIVERGED else UserError
            return kind(f"In process {self.rank} of {size}: {self.why}")
        return UserError(f"Process {self.rank} of {size} is gone: it was killed, or the machine had no memory left.")


def how_it_left(error: BaseException | None) -> tuple[str, str]:
    """What to tell the others of an error that ends this process (None: its work is done): how, and why."""
    if error is None:
        return DONE, ""
    if isinstance(error, Elsewhere):
        return FOLLOWED, ""
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return STOPPED, ""
    cause = out_of_memory(error) or error
    why = str(cause) if isinstance(cause, UserError) else f"{type(error).__name__}: {error}"
    return DIVERGED if isinstance(error, Diverged) else FAILED, why


class Peers:
    """The other processes. Made by all processes at the same time; `rank` in [0, size)."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        # every process is in it, so it is none of the other things that `new_group` can give
        self._line = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=FOR_EVER))
        self._heard = threading.Condition()
        self._left: dict[int, News] = {}
        self._leaving = False
        others = [other for other in range(size) if other != rank]
        self._listeners = [threading.Thread(target=self._listen, args=(other,), daemon=True) for other in others]
        for listener in self._listeners:
            listener.start()

    def check(self) -> None:
        """Raises what ends this process, once another one has failed, was stopped or is gone."""
        self._raise(self._problem())

    def explain(self) -> None:
        """Raises as `check`, with some patience: a message to another process has failed, and word is on the way."""
        with self._heard:
            self._heard.wait_for(lambda: self._problem() is not None, SOON)
        self._raise(self._problem())

    def leave(self, error: BaseException | None) -> None:
        """Tell the others that, and why, this process leaves. Only the first call counts."""
        with self._heard:
            if self._leaving:
                return
            self._leaving = True
        how, why = how_it_left(error)
        for other in range(self.size):
            if other != self.rank and other not in self._left:
                self._send(other, how, why)

    def close(self) -> None:
        """Leave, and let the others answer: no thread may still listen when the process ends."""
        self.leave(None)
        for listener in self._listeners:
            listener.join(SOON)

    @property
    def speaks(self) -> bool:
        """Whether it is this process that talks to the user: the first that is not gone."""
        return all(other in self._left and self._left[other].how == GONE for other in range(self.rank))

    def _raise(self, news: News | None) -> None:
        if news:
            error = news.error(self.size)
            raise error if self.speaks or isinstance(error, Interrupted) else Elsewhere(str(error))

    def _problem(self) -> News | None:
        """The first process that ended the run."""
        return next((news for news in list(self._left.values()) if news.how not in (DONE, FOLLOWED)), None)

    def _listen(self, other: int) -> None:
        message = torch.zeros(LENGTH, dtype=torch.uint8)
        try:
            dist.recv(message, src=other, group=self._line)
            how, _, why = bytes(message.tolist()).rstrip(b"\0").decode(errors="ignore").partition(" ")
            news = News(other, how, why)
        except RuntimeError:  # the connection is closed
            news = News(other, GONE)
        with self._heard:
            if self._leaving:
                return
            self._left[other] = news
            self._heard.notify_all()
        self._send(other, DONE)  # so that its listener, too, can go

    def _send(self, other: int, how: str, why: str = "") -> None:
        text = f"{how} {why}".encode(errors="replace")[:LENGTH].ljust(LENGTH, b"\0")
        with contextlib.suppress(RuntimeError):  # it is gone
            dist.send(torch.frombuffer(bytearray(text), dtype=torch.uint8), dst=other, group=self._line)
