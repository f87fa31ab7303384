"""Waiting for others, such as a server, that ends where nobody wants the answer any more: Ctrl-C, Cancel."""

import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent import futures
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

LOOK = 0.2  # seconds between two looks

Result = TypeVar("Result")


class _Given(BaseException):
    """Up: no `except Exception` on the way, as around the code of a reward, takes the end for a failure."""

    def __init__(self, why: BaseException) -> None:
        super().__init__(why)
        self.why = why


_check: ContextVar[Callable[[], None]] = ContextVar("check", default=lambda: None)


@contextmanager
def asking(check: Callable[[], None]) -> Iterator[None]:
    """Inside the block, what this thread waits for here ends with whatever `check`, called now and then, raises."""
    before = _check.set(check)
    try:
        yield
    except _Given as given:
        raise given.why from None
    finally:
        _check.reset(before)


def until(over: threading.Event) -> AbstractContextManager[None]:
    """`asking` for a thread of our own: once the event is set, its waits end with CancelledError."""

    def check() -> None:
        if over.is_set():
            raise futures.CancelledError

    return asking(check)


def result(job: "futures.Future[Result]", seconds: float = float("inf")) -> Result:
    """What the job returns or raises. Raises TimeoutError after so many seconds."""
    end = time.monotonic() + seconds
    while not job.done():
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        _look()
        futures.wait([job], min(LOOK, left))
    return job.result()


def first(jobs: "Collection[futures.Future[Result]]") -> "set[futures.Future[Result]]":
    """Those of the jobs that are done, once there are any; `jobs` are not empty."""
    while True:
        _look()
        done, _ = futures.wait(jobs, LOOK, futures.FIRST_COMPLETED)
        if done:
            return done


def pause(seconds: float) -> None:
    """Sleeps."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        _look()
        time.sleep(min(LOOK, left))


def _look() -> None:
    try:
        _check.get()()
    except BaseException as error:
        raise _Given(error) from None
