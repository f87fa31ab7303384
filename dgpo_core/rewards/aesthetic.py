"""The LAION aesthetic predictor: how people would rate the picture, whatever the prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgpo_core.common.errors import UserError
from dgpo_core.common.pictures import to_pil
from dgpo_core.rewards.clip import Clip
from dgpo_core.rewards.model import ModelReward
from dgpo_core.rewards.published import CLIP_L
from dgpo_core.rewards.weight_files import Weights, find_file, load_tensors

# The hub's copy of what the LAION repository calls sac+logos+ava1-l14-linearMSE.pth
PREDICTOR = Weights(
    "trl-lib/ddpo-aesthetic-predictor",
    "4 MB",
    file="aesthetic-model.pth",
    also=("sac+logos+ava1-l14-linearMSE.pth", "sac+logos+ava1-l14-linearMSE.safetensors"),
)


class Aesthetic(ModelReward):
    """About 1 (ugly) to 10 (beautiful); most pictures are between 4.5 and 7.

    path: a local sac+logos+ava1-l14-linearMSE.pth (or its tensors as .safetensors); clip: folder or hub id of CLIP
    ViT-L/14. dtype, batch: see `ModelReward`.
    Source: https://github.com/christophschuhmann/improved-aesthetic-predictor; the same file on the hub:
    https://huggingface.co/trl-lib/ddpo-aesthetic-predictor.
    """

    range = (1.0, 10.0)
    licence = "Apache-2.0 (predictor), MIT (CLIP)"
    weights = (PREDICTOR, CLIP_L)
    file_option = "path"

    def __init__(
        self, device: str = "cpu", path: str = "", clip: str = "", dtype: str = "auto", batch: int = 16
    ) -> None:
        super().__init__(device, dtype, batch)
        self.predictor = load_predictor(find_file(PREDICTOR, path, "aesthetic"))
        self.clip = Clip(CLIP_L, clip, self.dtype, "aesthetic")
        expected, given = self.predictor.layers[0].in_features, self.clip.model.config.projection_dim
        if expected != given:
            raise UserError(
                f"Reward 'aesthetic': the predictor takes embeddings of {expected} numbers, the CLIP model gives"
                f" {given}: use {CLIP_L}."
            )

    def networks(self) -> Sequence[nn.Module]:
        return (self.clip.model, self.predictor)

    def score_batch(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.predictor(self.clip.images([to_pil(image) for image in images]))


class Predictor(nn.Module):
    """Five linear layers without activations between them, as published; the dropouts keep the layers' numbers.

    widths: of the embedding and of the four hidden layers (published: 768, 1024, 128, 64, 16). ImageReward's
    head is the same.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.layers = nn.Sequential(
            nn.Linear(a, b),
            nn.Dropout(0.2),
            nn.Linear(b, c),
            nn.Dropout(0.2),
            nn.Linear(c, d),
            nn.Dropout(0.1),
            nn.Linear(d, e),
            nn.Linear(e, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Unit-length embeddings float32 [B, D] -> scores [B]."""
        return self.layers(embeddings).squeeze(-1)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "Predictor":
        """The predictor with these weights, in float32. Raises KeyError, IndexError or RuntimeError for others."""
        predictor = cls([state[f"layers.{n}.weight"].shape[1] for n in (0, 2, 4, 6, 7)])
        predictor.load_state_dict(state)
        return predictor.to(torch.float32).eval().requires_grad_(False)


def load_predictor(path: Path) -> Predictor:
    """The predictor of a weights file. Raises UserError where the file holds another network."""
    try:
        return Predictor.of(load_tensors(path))
    except (KeyError, IndexError, RuntimeError):
        raise UserError(f"{path} is not the LAION aesthetic predictor (sac+logos+ava1-l14-linearMSE.pth).") from None
