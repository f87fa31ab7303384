"""What is wrong in a graph that is queued, with the widget at fault, for as long as ComfyUI looks at it.

ComfyUI asks each node about its own widgets, and shows what the node answers at every one that it was asked about. So a
node notes here which one is meant; what only the graph as a whole can tell lies here before ComfyUI asks.
Nothing here knows ComfyUI.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fault:
    """An input, by its id, and one sentence about it."""

    name: str
    text: str


@dataclass
class _Request:
    """Of one request: what the graph says of nodes, by their ids, and the inputs that sentences are about."""

    of_graph: Mapping[str, Fault]
    named: dict[str, str] = field(default_factory=dict)


_request: ContextVar[_Request | None] = ContextVar("dgpo_request", default=None)


@contextmanager
def request(of_graph: Mapping[str, Fault]) -> Iterator[Mapping[str, str]]:
    """While ComfyUI looks at a graph; gives the input that each sentence is about, as `note` hears of it."""
    known = _Request(of_graph)
    token = _request.set(known)
    try:
        yield known.named
    finally:
        _request.reset(token)


def note(fault: Fault) -> str:
    """Its sentence, for ComfyUI; from here on it is known whose it is."""
    known = _request.get()
    if known is not None:
        known.named[fault.text] = fault.name
    return fault.text


def of_node(node: str) -> Fault | None:
    """What the graph as a whole says of a node."""
    known = _request.get()
    return known.of_graph.get(node) if known is not None else None


def one_each(node_errors: Mapping[str, dict], named: Mapping[str, str]) -> dict[str, dict]:
    """ComfyUI's errors by node, each sentence of a node's once, at the input that it is about."""
    return {node: {**said, "errors": _once(said["errors"], named)} for node, said in node_errors.items()}


def _once(errors: list[dict], named: Mapping[str, str]) -> list[dict]:
    kept: dict[str, dict] = {}
    for error in errors:
        _, _, text = error.get("details", "").partition(" - ")
        name = named.get(text)
        if error.get("type") != "custom_validation_failed" or name is None:
            kept[f"{len(kept)} of ComfyUI's"] = error
        elif text not in kept:
            kept[text] = {**error, "details": f"{name} - {text}", "extra_info": {"input_name": name}}
    return list(kept.values())
