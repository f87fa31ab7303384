"""The prompt that a picture was drawn for, from what ComfyUI and A1111's web UI write into their pictures.

ComfyUI's SaveImage writes "prompt", the graph as it was run, and "workflow", the graph as it was seen; A1111's web UI
writes "parameters", an infotext. Some nodes write both.
"""

from collections.abc import Mapping
from typing import Any

from dgpo_core.comfy.graph import UNREADABLE, graph_prompt
from dgpo_core.comfy.infotext import positive_prompt
from dgpo_core.common.errors import NoPrompt, SeveralPrompts, UserError
from dgpo_core.common.reading import parse_json

__all__ = ["GRAPHS", "INFOTEXT", "OTHERS", "NoPrompt", "prompt_of"]

GRAPHS, INFOTEXT = ("prompt", "workflow"), "parameters"
NONE = "holds no prompt of ComfyUI's and no infotext of A1111's"
OTHERS = {
    "invokeai_metadata": "InvokeAI",
    "sd-metadata": "InvokeAI",
    "Dream": "InvokeAI",
    "fooocus_scheme": "Fooocus",
    "generation_data": "TensorArt",
}
"""Texts of other tools, which are not read."""


def prompt_of(chunks: Mapping[str, Any]) -> str:
    """The positive prompt in a picture's texts, by their names. Raises NoPrompt if there is not just one.

    The graph goes before an infotext, which counts where the graph does not hold the text.
    """
    written = next((chunks[name] for name in GRAPHS if isinstance(chunks.get(name), str)), None)
    infotext = chunks.get(INFOTEXT)
    if written is not None:
        try:
            return graph_prompt(_parsed(written))
        except SeveralPrompts:
            raise
        except NoPrompt:
            if not isinstance(infotext, str):
                raise
    if not isinstance(infotext, str):
        tool = next((tool for name, tool in OTHERS.items() if name in chunks), None)
        raise NoPrompt(f"holds the settings of {tool}, which are not read" if tool else NONE)
    if infotext.lstrip().startswith("{"):
        raise NoPrompt("holds settings in JSON of a tool that is not read, and no prompt of ComfyUI's")
    return positive_prompt(infotext)


def _parsed(written: str) -> Any:
    """A graph; some savers put it, as a text or not, into an object with all that they know."""
    try:
        data = parse_json(written, "The workflow")
        inner = data.get("prompt") if isinstance(data, dict) else None
        if isinstance(inner, str):
            return parse_json(inner, "The workflow")
    except UserError:
        raise NoPrompt(UNREADABLE) from None
    return inner if isinstance(inner, dict) and "class_type" not in inner else data
