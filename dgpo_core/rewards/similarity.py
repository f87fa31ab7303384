"""How much of the source picture is still in an edited one, by its structure and its colours; nothing is downloaded."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dgpo_core.common.errors import UserError
from dgpo_core.rewards.base import EditReward
from dgpo_core.rewards.statistics import luma

WINDOW = 7  # pixels of SSIM's window
C1, C2 = 0.01**2, 0.03**2


class Similarity(EditReward):
    """1 for the source itself; lower for other structure (brightness's SSIM) and for other colours.

    What is compared is made `side` pixels tall and wide by averages, so that noise and fine texture count little.
    structure: the share of SSIM in the score; the rest is 1 minus the mean distance of the colours, in RGB of [0, 1],
    over the largest there is. Of several sources the first counts. As the only reward it teaches to do nothing: give
    it beside one that says what was asked, or only watch it.
    Source of SSIM: Wang et al. 2004, with uniform windows.
    """

    range = (-1.0, 1.0)
    shareable = ("side", "structure")

    def __init__(self, device: str = "cpu", side: int = 256, structure: float = 0.5) -> None:
        super().__init__(device)
        if isinstance(side, bool) or not isinstance(side, int) or not WINDOW <= side <= 4096:
            raise UserError(f"The reward 'similarity' takes a side of {WINDOW} to 4096, not {side!r}.")
        if isinstance(structure, bool) or not isinstance(structure, int | float) or not 0 <= structure <= 1:
            raise UserError(f"The reward 'similarity' takes a structure of 0 to 1, not {structure!r}.")
        self.side, self.structure = side, float(structure)

    def score_edits(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        sources: Sequence[Sequence[Tensor]],
    ) -> Tensor:
        parts = [self._like(image[None], of[0][None]) for image, of in zip(images, sources, strict=True)]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _like(self, image: Tensor, source: Tensor) -> Tensor:
        """[1, 3, H, W], [1, 3, h, w] -> [1]."""
        side = min(self.side, *image.shape[-2:], *source.shape[-2:])
        a, b = (F.adaptive_avg_pool2d(x.float().clamp(0, 1), max(side, WINDOW)) for x in (image, source))
        colors = 1 - (a - b).square().sum(dim=1).sqrt().mean(dim=(1, 2)) / 3**0.5
        return self.structure * ssim(luma(a), luma(b)) + (1 - self.structure) * colors


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity [B] of brightness [B, H, W] in [0, 1]; 1 where they are equal."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x[:, None], WINDOW, stride=1)[:, 0]

    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2
    cov = mean(a * b) - mu_a * mu_b
    value = ((2 * mu_a * mu_b + C1) * (2 * cov + C2)) / ((mu_a**2 + mu_b**2 + C1) * (var_a + var_b + C2))
    return value.mean(dim=(1, 2))
