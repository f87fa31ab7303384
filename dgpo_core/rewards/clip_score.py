"""CLIP score: how well the image fits the prompt, by OpenAI's CLIP."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dgpo_core.rewards.clip import Clip, ClipReward
from dgpo_core.rewards.published import CLIP_L


class ClipScore(ClipReward):
    """The cosine of image and prompt in CLIP ViT-L/14; good images are at about 0.25 to 0.35.

    path: folder or hub id of another CLIPModel, or one file of OpenAI's. dtype, batch: see `ModelReward`.
    Source: https://huggingface.co/openai/clip-vit-large-patch14, https://arxiv.org/abs/2104.08718 (without its factor
    2.5 and its cut-off at 0).
    """

    range = (-1.0, 1.0)
    licence = "MIT"
    weights = (replace(CLIP_L, option="path"),)

    def __init__(self, device: str = "cpu", path: str = "", dtype: str = "auto", batch: int = 16) -> None:
        super().__init__(device, dtype, batch)
        self.clip = Clip(self.weights[0], path, self.dtype, "clip_score")

    def networks(self) -> Sequence[nn.Module]:
        return (self.clip.model,)

    def score_batch(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.clip.cosines(images, prompts)
