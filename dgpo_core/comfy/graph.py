"""From a graph of ComfyUI's to the text that its sampler was given.

The graph is read as it was run (API format) or, where only that is there, as it was seen (UI format). From every node
that draws, the way leads up along its positive conditioning, through nodes of which it is known what they do to a text
(`comfy_nodes`), to the texts that are written down. Where the way ends elsewhere, nobody can tell what was drawn.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dgpo_core.comfy.forms import PROMPT_LIST, TEXT
from dgpo_core.comfy.node_table import DETAILERS, LONGEST, RULES, SAMPLERS, SCRIPTS, WIDGETS
from dgpo_core.common.errors import NoPrompt, SeveralPrompts, UserError
from dgpo_core.common.prompts import read_prompts
from dgpo_core.common.reading import shown

Output = tuple[str, int]
"""A node's id, and which of its outputs."""
NO_TEXT = "has no text at its sampler in the workflow that it holds"
UNREADABLE = "holds a workflow that cannot be read"
MUTED, BYPASSED = 2, 4
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")
"""What a front end stores behind the value of a seed."""


@dataclass(frozen=True)
class Node:
    """inputs: values of widgets, and links as [id of the other node, output]."""

    kind: str
    inputs: Mapping[str, Any]


def graph_prompt(data: Any) -> str:
    """The one text that everything in a workflow was drawn for. Raises NoPrompt where there is not just one."""
    nodes = _nodes(data)
    texts = _Texts(nodes)
    prompts = {texts.at(link).strip(): None for link in _drawn_for(nodes)} or _own_prompts(nodes)
    if len(prompts) > 1:
        raise SeveralPrompts(f"was drawn with {len(prompts)} different positive prompts in the workflow that it holds")
    text = next(iter(prompts), "")
    if not text:
        raise NoPrompt(NO_TEXT)
    return text


class _Texts:
    """The text at each output of a graph: each is looked for once, without recursion, whatever leads to it."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self._nodes = nodes
        self._known: dict[Output, str | NoPrompt] = {}

    def at(self, link: Output) -> str:
        """Raises NoPrompt where it is not in the graph."""
        way: dict[Output, None] = {link: None}
        while way:
            here = next(reversed(way))
            try:
                self._known[here] = self._of(here)
            except _Needed as needed:
                if needed.output not in way:
                    way[needed.output] = None
                    continue
                self._known[here] = NoPrompt("holds a workflow that goes round in a circle")
            except NoPrompt as error:
                self._known[here] = error
            way.popitem()
        return self.known(link)

    def known(self, link: Output) -> str:
        """What was found at an output; asks for what was not looked for yet."""
        if link not in self._known:
            raise _Needed(link)
        text = self._known[link]
        if isinstance(text, NoPrompt):
            raise text
        return text

    def _of(self, link: Output) -> str:
        node = self._nodes.get(link[0])
        if node is None:
            raise NoPrompt("holds a workflow in which a node is missing")
        if node.kind not in RULES:
            raise NoPrompt(f"has its text from the node {shown(node.kind, 60)}, whose output is not in the file")
        text = RULES[node.kind](_At(self, node.inputs, link[1]))
        if len(text) > LONGEST:
            raise NoPrompt(f"has a text of more than {LONGEST} characters in the workflow that it holds")
        return text


class _Needed(Exception):
    """Another output has to be looked at before."""

    def __init__(self, output: Output) -> None:
        self.output = output


@dataclass(frozen=True)
class _At:
    """One output of a node, for its rule."""

    texts: _Texts
    inputs: Mapping[str, Any]
    output: int

    def text(self, name: str) -> str:
        value = self.inputs.get(name)
        link = _link(value)
        if link:
            return self.texts.known(link)
        if not isinstance(value, str):
            raise NoPrompt(NO_TEXT)
        return value

    def linked(self, name: str) -> bool:
        return _link(self.inputs.get(name)) is not None


# --- what was drawn --------------------------------------------------------------------------------------------------


def _drawn_for(nodes: Mapping[str, Node]) -> list[Output]:
    """The outputs that anything was drawn for; which of several samplers made this picture, the file does not say."""
    links = []
    for node in nodes.values():
        inputs = [_link(node.inputs.get(key)) for key in _positive(node)]
        if any(inputs):
            _refuse_scripts(node, nodes)
        links += [link for link in inputs if link]
    return links


def _positive(node: Node) -> tuple[str, ...]:
    """The inputs that say what a node draws; none for one that draws nothing of its own."""
    if node.kind in SAMPLERS:
        return SAMPLERS[node.kind]
    if node.kind in RULES or node.kind in DETAILERS:
        return ()
    guider = node.kind.endswith("Guider") and "positive" not in node.inputs
    return ("conditioning",) if guider else ("positive",)


def _refuse_scripts(node: Node, nodes: Mapping[str, Node]) -> None:
    link = _link(node.inputs.get("script"))
    script = nodes.get(link[0]) if link else None
    if script and script.kind not in SCRIPTS:
        raise NoPrompt(f"was drawn by the script of the node {shown(script.kind, 60)}, which may change the prompt")


def _own_prompts(nodes: Mapping[str, Node]) -> dict[str, None]:
    """The prompts of this pack's own node, whose pictures come from no sampler of ComfyUI's."""
    prompts: dict[str, None] = {}
    for node in nodes.values():
        text = node.inputs.get("text")
        if node.kind == PROMPT_LIST.id and node.inputs.get("source") == TEXT and isinstance(text, str):
            try:
                prompts |= {prompt.text: None for prompt in read_prompts(text)}
            except UserError:
                raise NoPrompt(NO_TEXT) from None
    return prompts


def _link(value: Any) -> Output | None:
    """Where an input gets its value from, if it is connected."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int) and type(value[1]) is int:
        return str(value[0]), value[1]
    return None


# --- formats ---------------------------------------------------------------------------------------------------------


def _nodes(data: Any) -> dict[str, Node]:
    try:
        return _from_ui(data) if "nodes" in data else _from_api(data)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise NoPrompt(UNREADABLE) from None


def _from_api(data: Mapping[str, Any]) -> dict[str, Node]:
    return {key: _node(node["class_type"], node["inputs"]) for key, node in data.items()}


def _node(kind: Any, inputs: Any) -> Node:
    if not isinstance(kind, str) or not isinstance(inputs, dict):
        raise TypeError
    return Node(kind, inputs)


def _from_ui(data: Mapping[str, Any]) -> dict[str, Node]:
    """The front end lists links apart, lets a text be a template, and keeps what is switched off."""
    if data.get("definitions", {}).get("subgraphs"):
        raise NoPrompt("holds a workflow with subgraphs, not the graph that was run")
    links = {link[0]: (link[1], link[2]) for link in data["links"]}
    drawn = {node["id"]: node for node in data["nodes"]}
    on = {key: node for key, node in drawn.items() if node.get("mode", 0) not in (MUTED, BYPASSED)}
    return {str(key): _node(node["type"], dict(_ui_inputs(node, links, drawn))) for key, node in on.items()}


def _ui_inputs(
    node: Mapping[str, Any], links: Mapping[Any, tuple[Any, int]], drawn: Mapping[Any, Any]
) -> Iterator[tuple[str, Any]]:
    slots, values = node.get("inputs") or [], node.get("widgets_values") or []
    if isinstance(values, list):
        named = [slot["name"] for slot in slots if "widget" in slot] or WIDGETS.get(node["type"], ())
        yield from zip(named, _as_run(values), strict=False)
    for slot in slots:
        source = _through_bypassed(links.get(slot.get("link")), links, drawn)
        if source:
            yield slot["name"], list(source)


def _as_run(values: list[Any]) -> Iterator[Any]:
    """Values of widgets without what stands behind a seed. NoPrompt for a text that the front end draws by chance."""
    for value in values:
        if isinstance(value, str) and any(sign in value for sign in ("{", "//", "/*")):
            raise NoPrompt("holds the workflow with a template of the prompt, not the graph that was run")
        if value not in AFTER_GENERATE:
            yield value


def _through_bypassed(
    source: tuple[Any, int] | None, links: Mapping[Any, tuple[Any, int]], drawn: Mapping[Any, Any]
) -> tuple[Any, int] | None:
    """Where a link really begins: a bypassed node gives out what it gets, by type; a muted one gives nothing."""
    for _ in drawn:
        if source is None:
            return None
        node = drawn.get(source[0])
        if node is None or node.get("mode", 0) not in (MUTED, BYPASSED):
            return source
        if node["mode"] == MUTED:
            return None
        kind, slots = node["outputs"][source[1]]["type"], node.get("inputs") or []
        same = [slot for slot in slots if slot.get("type") == kind]
        at_place = [slot for slot in slots[source[1] : source[1] + 1] if slot in same]
        source = links.get((at_place or same or [{}])[0].get("link"))
    return None
