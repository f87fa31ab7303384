"""PickScore: which image people would pick for the prompt, by a CLIP-H trained on 500,000 of their choices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dgpo_core.common.errors import UserError
from dgpo_core.rewards.clip import Clip
from dgpo_core.rewards.model import ModelReward
from dgpo_core.rewards.weight_files import Weights, find

MODEL = Weights("yuvalkirstain/PickScore_v1", "3.9 GB")
PROCESSOR = Weights("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "its tokenizer, 4 MB", option="processor")
TOKENIZER = "tokenizer_config.json"


class PickScore(ModelReward):
    """exp(logit_scale) * cosine, divided by `scale`; with scale 1 the published score, mostly 18 to 24.

    path: folder or hub id of the model; processor: of its tokenizer (left out, the folder `path` if it holds one, else
    that of the model card). scale: what the score is divided by (RL code takes 26). dtype, batch: see `ModelReward`.
    Source: https://huggingface.co/yuvalkirstain/PickScore_v1 (model card), https://arxiv.org/abs/2305.01569.
    """

    range = (-100.0, 100.0)
    licence = "MIT (the repository's; the model card names none)"
    weights = (MODEL, PROCESSOR)
    shareable = (*ModelReward.shareable, "scale")

    def __init__(
        self,
        device: str = "cpu",
        path: str = "",
        processor: str = "",
        scale: float = 1.0,
        dtype: str = "auto",
        batch: int = 8,
    ) -> None:
        super().__init__(device, dtype, batch)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
            raise UserError(f"The scale of the reward 'pickscore' must be a number above 0, not {scale!r}.")
        self.scale = scale
        folder = str(find(MODEL, path))
        if not processor and (Path(folder) / TOKENIZER).is_file():
            processor = folder
        self.clip = Clip(MODEL, path, self.dtype, "pickscore", tokenizer=(PROCESSOR, processor))

    @classmethod
    def sources(cls, options: Mapping[str, Any]) -> list[tuple[Weights, Any]]:
        folder = Path(str(find(MODEL, options.get("path", ""))))
        own = not options.get("processor") and (folder / TOKENIZER).is_file()
        return super().sources(options)[: 1 if own else 2]

    def networks(self) -> Sequence[nn.Module]:
        return (self.clip.model,)

    def score_batch(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.clip.cosines(images, prompts) * self.clip.scale / self.scale
