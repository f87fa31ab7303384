"""PickScore: which image people would pick for the prompt, by a CLIP-H trained on 500,000 of their choices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dgpo_core.common.errors import UserError
from dgpo_core.rewards.clip import LAION, Clip, ClipReward
from dgpo_core.rewards.published import PICKSCORE, PICKSCORE_WORDS
from dgpo_core.rewards.weight_files import Weights, find

TOKENIZER = "tokenizer_config.json"


class PickScore(ClipReward):
    """exp(logit_scale) * cosine, divided by `scale`; with scale 1 the published score, mostly 18 to 24.

    path: folder, hub id or one file of the model; processor: folder or hub id of its tokenizer (left out, the folder
    `path` if it holds one, else that of the model card). scale: what the score is divided by (RL code takes 26).
    dtype, batch: see `ModelReward`.
    Source: https://huggingface.co/yuvalkirstain/PickScore_v1 (model card), https://arxiv.org/abs/2305.01569.
    """

    range = (-100.0, 100.0)
    licence = "MIT (the repository's; the model card names none)"
    weights = (PICKSCORE, PICKSCORE_WORDS)
    shareable = (*ClipReward.shareable, "scale")

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
        folder = str(find(PICKSCORE, path))
        if not processor and (Path(folder) / TOKENIZER).is_file():
            processor = folder
        words = (PICKSCORE_WORDS, processor)
        self.clip = Clip(PICKSCORE, path, self.dtype, "pickscore", tokenizer=words, activation=LAION)

    @classmethod
    def sources(cls, options: Mapping[str, Any]) -> list[tuple[Weights, Any]]:
        model, words = ((weights, options.get(weights.option, "")) for weights in cls.weights)
        own = not words[1] and (Path(str(find(*model))) / TOKENIZER).is_file()
        return [model] if own else [model, words]

    def networks(self) -> Sequence[nn.Module]:
        return (self.clip.model,)

    def score_batch(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.clip.cosines(images, prompts) * self.clip.scale / self.scale
