"""Finish now: the button of a node that trains asks the training to end there, with what it has.

`FINISHING` is made when ComfyUI imports the nodes, and gone with the process. The thread in which nodes run trains,
ComfyUI's server hears of the button; what both touch is locked.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Finished(Exception):
    """Raised inside a training that is to end: the round that is on its way does not count."""

    outcome = "finished"  # of a question that was open then


class Finishing:
    """The trainings that run, by the ids of their nodes, and how often each was asked to finish."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, threading.Event] = {}
        self._asked: Counter[str] = Counter()

    @contextmanager
    def training(self, node: str) -> Iterator[threading.Event]:
        """While the node trains; the event is set once it is asked to finish."""
        with self._lock:
            asked = self._running[node] = threading.Event()
        try:
            yield asked
        finally:
            with self._lock:
                self._running.pop(node, None)

    def ask(self, node: str) -> bool:
        """Whether the node trains, and so will finish.

        node: its id on the canvas that it stands on. In a subgraph it runs as "12:3", by the ids of all that it is in.
        """
        with self._lock:
            inside = [name for name in self._running if name.endswith(f":{node}")]
            name = inside[0] if node not in self._running and len(inside) == 1 else node
            asked = self._running.get(name)
            if asked is not None and not asked.is_set():
                asked.set()
                self._asked[name] += 1
            return asked is not None

    def given_up(self, node: str) -> None:
        """The node has stopped by itself before it was done, which counts as if it had been asked to."""
        with self._lock:
            self._asked[node] += 1

    def times(self, node: str | None) -> int:
        """How often the node was asked to, or gave up: what came of it no longer stands for the whole training.

        node: None where ComfyUI does not say which (0.3.64, before a node runs); then those of all count.
        """
        with self._lock:
            return self._asked.total() if node is None else self._asked[node]


FINISHING = Finishing()
