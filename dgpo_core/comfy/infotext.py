"""The positive prompt in an infotext: what AUTOMATIC1111's web UI, and others after it, write into their pictures.

a green boat on a lake, <lora:x:0.8>
Negative prompt: ugly
Steps: 20, Sampler: Euler a, Seed: 1, Size: 512x512
"""

import re

from dgpo_core.common.errors import NoPrompt, SeveralPrompts
from dgpo_core.common.prompt_syntax import is_infotext_line, is_template

_TAGS = re.compile(r"<(?:lora|lyco|hypernet|hypernetwork):[^<>]{0,200}>", re.IGNORECASE)
_HIRES = re.compile(r'\bHires prompt: ?("(?:\\.|[^"\\]){0,20000}"|[^,\n]{0,20000})')


def positive_prompt(text: str) -> str:
    """What the sampler was given: without the tags that load LoRAs, which the web UI takes out before.

    Raises NoPrompt for a text that is no infotext, or that does not say what was drawn.
    """
    lines = text.split("\n")
    end = next((number for number, line in enumerate(lines) if is_infotext_line(line)), None)
    if end is None:
        raise NoPrompt("holds no prompt of ComfyUI's, and its parameters are no infotext of A1111's")
    prompt = _clean("\n".join(lines[:end]))
    if not prompt:
        raise NoPrompt("holds an infotext without a prompt")
    if is_template(prompt):
        raise NoPrompt("holds an infotext with wildcards in place of the text that was drawn")
    hires = _HIRES.search("\n".join(lines[end:]))
    again = _clean(hires[1].strip('"').replace("\\n", "\n")) if hires else ""
    if again and again != prompt:
        raise SeveralPrompts("was drawn with 2 different positive prompts in the infotext that it holds")
    return prompt


def _clean(prompt: str) -> str:
    return _TAGS.sub("", prompt).strip(" ,\r\n\t") if _TAGS.search(prompt) else prompt.strip()
