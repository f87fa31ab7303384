"""Prompts: what the groups are drawn for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from comfy_api.v0_0_2 import io
from torch import Tensor

from dgpo_core.comfy.forms import PROMPT_LIST, SHIPPED, TEXT
from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt, load_prompts, read_prompts
from dgpo_core.common.source import Source
from dgpo_core.common.wildcards import drawn

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
                advanced=("order_seed", "wildcards", "wildcard_seed"),
                **fields.ORDER,
                source={
                    "options": host.prompt_file_choices(),
                    "tooltip": "The text below, the embedded model's own prompts, or a file in ComfyUI's input folder.",
                },
                images="For a model that edits: one picture for all prompts, or one for each, in their order.",
                text={"multiline": True, "tooltip": "One prompt per line; lines that start with # are not."},
                wildcard_seed={"min": 0, "max": fields.SEEDS},
            ),
            outputs=[fields.Prompts.Output(display_name="prompts", tooltip="For a sampler or a loop.")],
        )

    @classmethod
    def validate_inputs(cls, source: str | None, text: str | None, wildcards: int | None = 0) -> bool | str:
        """Missing or broken files, and an empty text, are told before anything runs; None is a linked input."""
        linked = source == TEXT and text is None
        at_fault = "text" if source == TEXT else "source"

        def check(source: str) -> None:
            with_words(read(source, text or ""), int(bool(wildcards)), 0)

        return fields.first_error(**{at_fault: (check, None if linked else source)})

    @classmethod
    def execute(
        cls,
        source: str,
        text: str,
        per_iteration: int,
        order_seed: int,
        images: Tensor | None = None,
        wildcards: int = 0,
        wildcard_seed: int = 0,
    ) -> io.NodeOutput:
        prompts = read(source, text)
        if images is not None:
            prompts = about(prompts, images)
        prompts = with_words(prompts, wildcards, wildcard_seed)
        return io.NodeOutput(Prompts(tuple(prompts), per_iteration, order_seed))

    @classmethod
    def fingerprint_inputs(cls, source: str | None, text: str | None, **others: int) -> object:
        """Files that have changed are read again."""
        found = read_again(source, text)
        return [found, *host.wildcard_files()] if others.get("wildcards") else found


def with_words(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """With `count` prompts drawn of each that stands for many; 0: as they are."""
    return drawn(prompts, count, seed, host.wildcard_folder()) if count else list(prompts)


def about(prompts: Sequence[Prompt], images: Tensor) -> list[Prompt]:
    """The prompts with pictures [N, H, W, 3] to edit. Raises UserError where it cannot be told which is whose."""
    if any(prompt.sources for prompt in prompts):
        raise UserError("The prompt file names pictures of its own: disconnect images, or take the names out of it.")
    if len(images) not in (1, len(prompts)):
        raise UserError(
            f"There are {len(images)} images for {len(prompts)} prompts: connect one for all, or one for each."
        )
    sources = [Source.of_pixels(image[..., :3].movedim(-1, 0)) for image in images]
    each = sources if len(sources) == len(prompts) else sources * len(prompts)
    return [replace(prompt, sources=(source,)) for prompt, source in zip(prompts, each, strict=True)]


def read(source: str, text: str) -> list[Prompt]:
    """The prompts of a choice of the widget `source`. Raises UserError for a file that is not there, or no prompts."""
    if source == TEXT:
        return read_prompts(text)
    return load_prompts(SHIPPED[source] if source in SHIPPED else host.prompt_file(source))


def read_again(source: str | None, text: str | None) -> object:
    """What `read` would give now, so that ComfyUI can tell whether it has changed."""
    if source is None or source == TEXT:
        return text
    try:
        return [(p.text, repr(p.metadata), [s.key for s in p.sources]) for p in read(source, "")]
    except UserError as error:
        return str(error)


NODES = [PromptList]
