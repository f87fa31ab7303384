"""The prompt that a picture was drawn with, from what ComfyUI writes into its PNG files.

SaveImage writes two text chunks: "prompt", the graph as it was run, and "workflow", the graph as it was seen. From
every sampler or guider the way leads up along the positive conditioning to the node that encodes a text.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dgpo_core.prompts import read_prompts
from dgpo_core.workflow import Node, read_nodes

TEXTS = (
    "text",
    "text_g",
    "text_l",
    "clip_g",
    "clip_l",
    "t5xxl",
    "prompt",
    "string",
    "value",
)  # inputs that hold a text
ONWARD = (
    "positive",
    "conditioning",
    "conditioning_1",
    "conditioning_2",
    "conditioning_to",
    "conditioning_from",
    "source",
)


class NoPrompt(Exception):
    """The picture does not say what its prompt was; the text ends a sentence that starts with the file's name."""


def prompt_of(chunks: Mapping[str, Any]) -> str:
    """The positive prompt in a PNG's text chunks (PIL's `image.info`). Raises NoPrompt if there is not just one."""
    written = [chunks[name] for name in ("prompt", "workflow") if isinstance(chunks.get(name), str)]
    if not written:
        raise NoPrompt("holds no prompt of ComfyUI's")
    try:
        nodes = read_nodes(json.loads(written[0]))
    except ValueError:
        raise NoPrompt("holds a workflow that cannot be read") from None
    found = {text for link in _conditionings(nodes) for text in _texts(nodes, link, frozenset())}
    found = found or set(_own_prompts(nodes))
    if len(found) != 1:
        what = f"was drawn with {len(found)} different positive prompts" if found else "has no text at its sampler"
        raise NoPrompt(f"{what} in the workflow that it holds")
    return found.pop()


def _conditionings(nodes: Mapping[str, Node]) -> Iterator[list[Any]]:
    """The links that samplers and guiders get their positive conditioning by."""
    for node in nodes.values():
        name = "conditioning" if node.kind.endswith("Guider") and "positive" not in node.inputs else "positive"
        if _is_link(node.inputs.get(name)):
            yield node.inputs[name]


def _texts(nodes: Mapping[str, Node], link: list[Any], seen: frozenset[str]) -> list[str]:
    """The texts at the end of a link: the encoder's own (the longest, if it has several), or those further up."""
    name = str(link[0])
    node = nodes.get(name)
    if node is None or name in seen:
        return []
    seen |= {name}
    values = [node.inputs[key] for key in TEXTS if key in node.inputs]
    own = [value.strip() for value in values if isinstance(value, str)]
    own += [text for value in values if _is_link(value) for text in _texts(nodes, value, seen)]
    if any(own):
        return [max(own, key=len)]
    onward = [node.inputs[key] for key in ONWARD if _is_link(node.inputs.get(key))]
    return [text for value in onward for text in _texts(nodes, value, seen)]


def _own_prompts(nodes: Mapping[str, Node]) -> Iterator[str]:
    """The prompts of this pack's own node, whose pictures come from no sampler of ComfyUI's."""
    for node in nodes.values():
        text = node.inputs.get("text")
        if node.kind == "DGPO_Prompts" and node.inputs.get("source") == "the text below" and str(text or "").strip():
            yield from (prompt.text for prompt in read_prompts(str(text)))


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2
