"""Makes the translations that ComfyUI reads, from the nodes and from lists of words: `python tests/helpers/locales.py`.

locales/<language>/words.json has, for each English text on the nodes, the same in another language. From it, and from
what the nodes say of themselves in a running ComfyUI, locales/<language>/nodeDefs.json is made, in the form that the
front end takes; English has no list of words. It ends with an error where a text has no translation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from comfy_server import REPO, ComfyServer

LOCALES = REPO / "locales"
LANGUAGES = ("de", "es", "fr", "ja", "ko", "ru", "zh")
Nodes = Mapping[str, Mapping[str, Any]]


def node_defs(nodes: Nodes, word: Callable[[str], str]) -> dict[str, Any]:
    """What the front end wants to know of the nodes, every text through `word`."""
    return {id_: _node(node, word) for id_, node in sorted(nodes.items())}


def _node(node: Mapping[str, Any], word: Callable[[str], str]) -> dict[str, Any]:
    inputs = [pair for kind in ("required", "optional") for pair in node["input"].get(kind, {}).items()]
    outputs = enumerate(zip(node["output_name"], node["output_tooltips"], strict=True))
    return {
        "display_name": word(node["display_name"]),
        "description": word(node["description"]),
        "inputs": {
            name: {"name": word(spec[1].get("display_name") or name), "tooltip": word(spec[1]["tooltip"])}
            for name, spec in inputs
        },
        "outputs": {str(i): {"name": word(name), "tooltip": word(tooltip)} for i, (name, tooltip) in outputs},
    }


def texts(nodes: Nodes) -> list[str]:
    """All English texts, each once."""
    found: dict[str, None] = {}
    node_defs(nodes, lambda text: found.setdefault(text) or text)
    return list(found)


def words(language: str) -> dict[str, str]:
    """From English into a language."""
    return json.loads((LOCALES / language / "words.json").read_text("utf-8"))


def made(nodes: Nodes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each language with its nodeDefs.json. KeyError for a text that has no translation."""
    yield "en", node_defs(nodes, str)
    for language in LANGUAGES:
        yield language, node_defs(nodes, words(language).__getitem__)


def main() -> None:
    with ComfyServer() as server:
        nodes = {id_: node for id_, node in server.object_info().items() if id_.startswith("DGPO_")}
    if "--texts" in sys.argv:
        print(json.dumps(texts(nodes), ensure_ascii=False, indent=0))
        return
    for language, defs in made(nodes):
        path = LOCALES / language / "nodeDefs.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(defs, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
