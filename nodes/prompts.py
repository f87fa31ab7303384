"""Prompts: what the groups are drawn for."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from dgpo_core.comfy.forms import PROMPT_LIST, SHIPPED, TEXT
from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt, load_prompts, read_prompts
from dgpo_core.runs.assemble import DEMO

from .common import fields, host
from .common.values import Prompts


class PromptList(io.ComfyNode):
    """A list of prompts, and how many of them an iteration takes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_Prompts",
            display_name="Prompts",
            category=f"{host.CATEGORY}/train",
            **fields.aliases("training prompts"),
            description="The prompts to train on: written here, or from a .txt or .jsonl file in the input folder.",
            inputs=fields.inputs(
                PROMPT_LIST,
                advanced=("order_seed",),
                **fields.ORDER,
                source={
                    "options": host.prompt_file_choices(),
                    "tooltip": "The text below, the embedded model's own prompts, or a file in ComfyUI's input folder.",
                },
                text={"multiline": True, "tooltip": "One prompt per line; lines that start with # are not."},
            ),
            outputs=[fields.Prompts.Output(display_name="prompts", tooltip="For a sampler or a loop.")],
        )

    @classmethod
    def validate_inputs(cls, source: str | None, text: str | None) -> bool | str:
        """A missing or broken file, and an empty text, are told before anything runs; None is a linked input."""
        linked = source == TEXT and text is None
        at_fault = "text" if source == TEXT else "source"
        return fields.first_error(**{at_fault: (lambda source: read(source, text or ""), None if linked else source)})

    @classmethod
    def execute(cls, source: str, text: str, per_iteration: int, order_seed: int) -> io.NodeOutput:
        return io.NodeOutput(Prompts(tuple(read(source, text)), per_iteration, order_seed))

    @classmethod
    def fingerprint_inputs(cls, source: str | None, text: str | None, **others: int) -> object:
        """A file that has changed is read again."""
        return read_again(source, text)


def read(source: str, text: str) -> list[Prompt]:
    """The prompts of a choice of the widget `source`. Raises UserError for a file that is not there, or no prompts."""
    if source == TEXT:
        return read_prompts(text)
    return load_prompts(DEMO / SHIPPED[source] if source in SHIPPED else host.prompt_file(source))


def read_again(source: str | None, text: str | None) -> object:
    """What `read` would give now, so that ComfyUI can tell whether it has changed."""
    if source is None or source == TEXT:
        return text
    try:
        return [(prompt.text, repr(prompt.metadata)) for prompt in read(source, "")]
    except UserError as error:
        return str(error)


NODES = [PromptList]
