"""CLIP direction: did the picture change the way that the words did?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgpo_core.common.errors import UserError
from dgpo_core.common.pictures import to_pil
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.reading import shown
from dgpo_core.rewards.base import EditReward
from dgpo_core.rewards.clip import Clip, ClipReward
from dgpo_core.rewards.published import CLIP_L

BEFORE, AFTER = "source_caption", "target_caption"


class ClipDirection(EditReward, ClipReward):
    """The cosine, in CLIP ViT-L/14, of the step from source to image with the step between two captions.

    The metadata of every prompt say what the source shows and what the edit should: {"prompt": "make it night",
    "image": "a.png", "source_caption": "a street by day", "target_caption": "a street by night"}. An image that equals
    its source scores 0. Of several sources the first counts.
    path: folder or hub id of another CLIPModel, or one file of OpenAI's. dtype, batch: see `ModelReward`.
    Source: StyleGAN-NADA, https://arxiv.org/abs/2108.00946; as a measure of edits InstructPix2Pix,
    https://arxiv.org/abs/2211.09800.
    """

    range = (-1.0, 1.0)
    licence = "MIT"
    weights = (replace(CLIP_L, option="path"),)

    def __init__(self, device: str = "cpu", path: str = "", dtype: str = "auto", batch: int = 16) -> None:
        ClipReward.__init__(self, device, dtype, batch)
        self.clip = Clip(self.weights[0], path, self.dtype, "clip_direction")

    def networks(self) -> Sequence[nn.Module]:
        return (self.clip.model,)

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            for name in (BEFORE, AFTER):
                if not isinstance(prompt.metadata.get(name), str) or not prompt.metadata[name].strip():
                    raise UserError(
                        f"{shown(prompt.where, 1000) or 'A prompt'}: the reward clip_direction needs {BEFORE!r} and"
                        f" {AFTER!r}, two texts, beside the prompt {shown(prompt.text, 60)!r}; {name!r} is not there."
                    )

    def score_edits(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        sources: Sequence[Sequence[Tensor]],
    ) -> Tensor:
        self.check([Prompt(text, facts) for text, facts in zip(prompts, metadata, strict=True)])
        self._to(self.device)
        parts = []
        with torch.inference_mode():
            for start in range(0, len(images), self.batch):
                part = slice(start, start + self.batch)
                parts.append(self._directions(images[part], metadata[part], sources[part]).float().cpu())
        return torch.cat(parts) if parts else torch.zeros(0)

    def score_batch(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Images alone are not enough."""
        return self.score(images, prompts, metadata)

    def _directions(
        self, images: Tensor, metadata: Sequence[Mapping[str, Any]], sources: Sequence[Sequence[Tensor]]
    ) -> Tensor:
        captions = [facts[name] for name in (BEFORE, AFTER) for facts in metadata]
        words = self._distinct(captions, captions, self.clip.texts).chunk(2)
        first = [of[0] for of in sources]
        before = self._distinct(list(map(id, first)), first, self._seen)
        after = self._seen(list(images))
        return F.cosine_similarity(after - before, words[1] - words[0], dim=-1)

    def _seen(self, pictures: Sequence[Tensor]) -> Tensor:
        return self.clip.images([to_pil(picture) for picture in pictures])

    @staticmethod
    def _distinct(keys: Sequence[Any], values: Sequence[Any], embed: Any) -> Tensor:
        """Embeddings of all values, each of equal keys computed once: a group shares its source and its captions."""
        known = dict(zip(keys, values, strict=True))
        order = list(known)
        return embed(list(known.values()))[[order.index(key) for key in keys]]
