"""Qwen-Image-Edit: Qwen-Image that edits. Its text encoder sees the source pictures, and so does the network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dgpo_core.common.pictures import to_pil
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.source import Source
from dgpo_core.policy.base import Check, Cond
from dgpo_core.policy.families.language import mask_of
from dgpo_core.policy.families.qwenimage import QwenImage
from dgpo_core.policy.families.sources import SourceLatents, beside, require_as_many

_SEEN, _SEEN_ALONE = 384 * 384, 1024 * 1024
"""Pixels of a picture as the text encoder sees it: beside others, and in the first model, which takes one."""
_GRID = 32
"""What its sides are multiples of, as diffusers' own pipelines have it."""
_ABOUT = "\0"
"""Between a text and its pictures, in the name of both together."""


class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit (one picture), -2509 and -2511 (up to three), Apache-2.0.

    Pictures have the proportions of what is drawn; the network sees them at its size. (diffusers' own pipelines scale
    them to a megapixel.) All prompts of a training bring as many. A single file of it has the tensors of a Qwen-Image:
    it is known by its name, its header, or the family that is asked for.
    """

    family = "qwen-image-edit"
    pipeline_classes = ("QwenImageEditPlusPipeline", "QwenImageEditPipeline")
    architecture = "qwen-image-edit"
    marks = ()
    looks_like = "qwenimage"
    built_as_named = True
    needs = ("torchvision",)  # for what shows pictures to its text encoder
    example = "Qwen/Qwen-Image-Edit-2509"
    sources = (1, 3)

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        self._several = type(pipe).__name__ == "QwenImageEditPlusPipeline"
        self.sources = (1, 3 if self._several else 1)
        self._source_latents = SourceLatents(self)
        self._pictures: dict[str, tuple[Source, ...]] = {}  # while prompts are encoded

    def check_sources(self, prompts: Sequence[Prompt], size: tuple[int, int]) -> None:
        super().check_sources(prompts, size)
        require_as_many(prompts, self.family)

    def condition(self, prompts: Sequence[Prompt], negative: str, size: tuple[int, int]) -> tuple[list[Cond], Cond]:
        if not prompts:  # a process without groups; nothing is read without a picture
            return [], Cond({"tokens": torch.empty(0, 0, 0)})
        asked = [self._about(prompt.text, prompt.sources) for prompt in prompts]
        refused = [self._about(negative, prompt.sources) for prompt in prompts]
        try:
            found = self.encode([*asked, *refused])
        finally:
            self._pictures.clear()  # they are large, and a policy may be held through many trainings
        latents = self._source_latents.together(prompts, size)
        return beside(found[: len(prompts)], found[len(prompts) :], latents)

    def read_ahead(self, prompts: Iterable[str], check: Check) -> None:
        """Nothing: a text alone does not say what the text encoder will read."""

    def _about(self, text: str, sources: tuple[Source, ...]) -> str:
        """One name for a text and its pictures, by which `encode` and its cache know them."""
        name = _ABOUT.join([text, *(source.key for source in sources)])
        self._pictures[name] = sources
        return name

    def _encode(self, text: str) -> dict[str, Tensor]:
        pictures = [self._for_eyes(source) for source in self._pictures.get(text, ())]
        tokens, _ = self.pipe.encode_prompt(
            text.split(_ABOUT)[0],
            image=(pictures if self._several else pictures[0]) if pictures else None,
            device=self.pipe.text_encoder.device,
        )
        return {"tokens": tokens, "mask": mask_of(tokens)}

    def _for_eyes(self, source: Source) -> Image.Image:
        picture = to_pil(source.image())
        area = _SEEN if self._several else _SEEN_ALONE
        scale = math.sqrt(area / (picture.width * picture.height))
        width, height = (round(side * scale / _GRID) * _GRID for side in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
