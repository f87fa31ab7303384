"""Statistics of pictures, without a model. Meant to be watched: a hacked reward mostly shows here first."""

import io
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.pictures import to_pil
from dgpo_core.rewards.base import Reward, runs

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness, by ITU-R BT.601."""


class Statistic(Reward):
    """A number of each picture alone."""

    @abstractmethod
    def measure(self, images: Tensor) -> Tensor:
        """images float32 [B, 3, H, W] in [0, 1] -> [B]."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.measure(images.float().clamp(0, 1))


class JpegSize(Statistic):
    """Size as a JPEG file in KB (1000 bytes): more for more detail or noise. It grows with the number of pixels.

    quality: of the JPEG, 1 to 95. Source: the incompressibility task of DDPO, https://arxiv.org/abs/2305.13301.
    """

    range = (0.0, float("inf"))
    shareable = ("quality",)

    def __init__(self, device: str = "cpu", quality: int = 95) -> None:
        super().__init__(device)
        if not isinstance(quality, int) or not 1 <= quality <= 95:
            raise UserError(f"The reward 'jpeg_size' takes a quality of 1 to 95, not {quality!r}.")
        self.quality = quality

    def measure(self, images: Tensor) -> Tensor:
        return torch.tensor([self._size(image) for image in images], dtype=torch.float32)

    def _size(self, image: Tensor) -> float:
        buffer = io.BytesIO()
        to_pil(image).save(buffer, "JPEG", quality=self.quality)
        return buffer.tell() / 1000


class EdgeDensity(Statistic):
    """The share of pixels on an edge: where the brightness's Sobel gradient is above `threshold`.

    threshold: change of brightness per pixel, of a brightness in [0, 1]. The outermost pixels do not count.
    """

    range = (0.0, 1.0)
    shareable = ("threshold",)

    def __init__(self, device: str = "cpu", threshold: float = 0.1) -> None:
        super().__init__(device)
        if not isinstance(threshold, int | float) or not 0 <= threshold < 1:
            raise UserError(f"The threshold of the reward 'edge_density' must be 0 to below 1, not {threshold!r}.")
        self.threshold = threshold

    def measure(self, images: Tensor) -> Tensor:
        # Sobel's kernels in two steps, seven times as fast as a convolution; over 8: the gradient of a ramp that rises
        # by s per pixel is s
        y = luma(images) / 8
        down = y[:, :-2] + 2 * y[:, 1:-1] + y[:, 2:]
        across = y[:, :, :-2] + 2 * y[:, :, 1:-1] + y[:, :, 2:]
        dx, dy = down[:, :, 2:] - down[:, :, :-2], across[:, 2:] - across[:, :-2]
        return (dx.square() + dy.square() > self.threshold**2).float().mean(dim=(1, 2))


class Entropy(Statistic):
    """Shannon entropy of the brightness in 256 levels, in bits: 0 for one level, 8 for all levels alike."""

    range = (0.0, 8.0)

    def measure(self, images: Tensor) -> Tensor:
        levels = (luma(images) * 255).round().long().flatten(1)
        shares = torch.stack([torch.bincount(row, minlength=256) for row in levels]) / levels.shape[1]
        return torch.special.entr(shares).sum(dim=1) / torch.log(torch.tensor(2.0))


class Brightness(Statistic):
    """Mean brightness, 0 (black) to 1 (white)."""

    range = (0.0, 1.0)

    def measure(self, images: Tensor) -> Tensor:
        return luma(images).mean(dim=(1, 2))


class Saturation(Statistic):
    """Mean saturation of HSV, 0 (grey) to 1 (pure colours); black counts as grey."""

    range = (0.0, 1.0)

    def measure(self, images: Tensor) -> Tensor:
        high, low = images.amax(dim=1), images.amin(dim=1)
        return ((high - low) / high.clamp(min=1e-8)).mean(dim=(1, 2))


class GroupDiversity(Reward):
    """How far each image is from the others of its group, on average; 0 for equal images and for one alone.

    The distance of two images is the root mean square of their difference, made smaller to `side` x `side` by averages,
    so that noise counts little and composition and colour count. A group is the images whose equal prompts stand in a
    row (two groups of one prompt next to each other count as one). It falls where a training collapses to one picture
    per prompt.
    """

    range = (0.0, 1.0)
    shareable = ("side",)

    def __init__(self, device: str = "cpu", side: int = 32) -> None:
        super().__init__(device)
        if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= 1024:
            raise UserError(f"The reward 'group_diversity' takes a side of 1 to 1024, not {side!r}.")
        self.side = side

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(images.float().clamp(0, 1), self.side).flatten(1)
        scores = torch.zeros(len(images))
        for group in runs(prompts):
            members = small[group]
            distances = torch.stack([(members - member).square().mean(1).sqrt() for member in members])
            scores[group] = distances.sum(1) / max(1, len(members) - 1)
        return scores


def luma(images: Tensor) -> Tensor:
    """Brightness [B, H, W] in [0, 1] of images [B, 3, H, W]."""
    return torch.einsum("bchw,c->bhw", images, torch.tensor(LUMA))
