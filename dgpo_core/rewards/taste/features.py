"""What a taste sees of a picture and its prompt: numbers in blocks, from frozen parts, the same at every call.

Two kinds. `clip` needs the weights of the reward `clip_score`. `built-in` needs no download: how well the picture fits
the prompt is told by the embedded model, which knows only its own world of shapes. Both have the statistics, which
know no prompt. A file of a taste names its kind, and is only served on that.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from dgpo_core.common.errors import UserError
from dgpo_core.demo import likeness
from dgpo_core.rewards import weight_files
from dgpo_core.rewards.clip import Clip
from dgpo_core.rewards.published import CLIP_L
from dgpo_core.rewards.statistics import luma

Kind = Literal["clip", "built-in"]
KINDS: tuple[Kind, ...] = ("clip", "built-in")
CLIP = replace(CLIP_L, option="clip")
SIDE = 128  # pixels that the statistics look at
SCALES = (1, 2, 4)  # of which edges are measured
LAYOUT = 4  # cells along each side


class Features(ABC):
    """Numbers of pictures with a prompt each. blocks: what they are about, in order, with how many each has."""

    kind: ClassVar[Kind]
    blocks: tuple[tuple[str, int], ...]

    @property
    def width(self) -> int:
        """How many numbers a picture has."""
        return sum(width for _, width in self.blocks)

    @abstractmethod
    def of(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """float32 [B, width], of B pictures of any sizes."""

    def networks(self) -> Sequence[nn.Module]:
        """What can be moved to an accelerator."""
        return ()

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[None]:
        """Inside, `of` computes on the device; afterwards nothing is left there."""
        try:
            for network in self.networks():
                network.to(device)
            yield
        finally:
            for network in self.networks():
                network.to("cpu")


STATISTICS = (("colour", 18), ("edges", 4 * len(SCALES)), ("layout", 2 * LAYOUT**2))


class BuiltIn(Features):
    """Fit to the prompt as the embedded model knows it (`demo.likeness`), colour, edges, layout."""

    kind = "built-in"
    blocks = (("fit", len(likeness.LEVELS)), *STATISTICS)

    def of(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        fit = likeness.likeness(_pixels(pictures, likeness.SIDE), prompts)
        return torch.cat([fit, statistics(pictures)], dim=1)


class ClipFeatures(Features):
    """Fit to the prompt as CLIP knows it, CLIP's embedding of the picture, colour, edges, layout.

    given: what an option says of CLIP's weights; dtype: of CLIP. Raises UserError where they cannot be had.
    """

    kind = "clip"

    def __init__(self, given: str = "", dtype: torch.dtype = torch.float32) -> None:
        self.clip = Clip(CLIP, given, dtype, "taste")
        self.blocks = (("fit", 1), ("picture", self.clip.model.config.projection_dim), *STATISTICS)

    def networks(self) -> Sequence[nn.Module]:
        return (self.clip.model,)

    def of(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        distinct = list(dict.fromkeys(prompts))
        with torch.inference_mode():
            seen = self.clip.images(pictures)
            texts = self.clip.texts(distinct)[[distinct.index(prompt) for prompt in prompts]]
            fit = (seen * texts).sum(-1, keepdim=True)
        return torch.cat([fit.cpu(), seen.cpu(), statistics(pictures)], dim=1)


def features(kind: str = "auto", clip: str = "", dtype: torch.dtype = torch.float32) -> Features:
    """The features of a kind; "auto" is `clip` where CLIP's weights are on this machine, else `built-in`.

    clip, dtype: see `ClipFeatures`. Raises UserError for another kind, and for CLIP without its weights.
    """
    if kind not in ("auto", *KINDS):
        raise UserError(f"A taste's features must be auto, {' or '.join(KINDS)}, not {kind!r}.")
    if kind == "auto":
        kind = "clip" if clip or weight_files.is_here(CLIP) else "built-in"
    return ClipFeatures(clip, dtype) if kind == "clip" else BuiltIn()


def statistics(pictures: Sequence[Image.Image]) -> Tensor:
    """Of the blocks `STATISTICS`, float32 [B, .]: pictures are squeezed to `SIDE` x `SIDE` pixels first.

    colour: mean and deviation of red, green, blue, brightness and saturation, quartiles of brightness, and how much
    there is of five hues. edges: at each scale the mean change of brightness across and down, how much of it is strong,
    and its deviation. layout: brightness and saturation of 4 x 4 cells.
    """
    images = _pixels(pictures, SIDE)
    light, high, low = luma(images), images.amax(1), images.amin(1)
    chroma = high - low
    saturation = chroma / high.clamp(min=1e-3)
    planes = torch.cat([images, light[:, None], saturation[:, None]], dim=1)
    quartiles = torch.quantile(light.flatten(1), torch.tensor([0.1, 0.5, 0.9]), dim=1).T
    colour = torch.cat([planes.mean((2, 3)), planes.std((2, 3)), quartiles, _hues(images, chroma)], dim=1)
    edges = torch.cat([_edges(avg_pool2d(light[:, None], scale)) for scale in SCALES], dim=1)
    layout = avg_pool2d(torch.stack([light, saturation], dim=1), SIDE // LAYOUT).flatten(1)
    return torch.cat([colour, edges, layout], dim=1)


def _hues(images: Tensor, chroma: Tensor) -> Tensor:
    """How much colour there is near red, yellow, green, blue and purple, [B, 5]."""
    red, green, blue = images.unbind(1)
    angle = torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue)
    centres = torch.tensor([0.0, 60.0, 120.0, 230.0, 300.0]).deg2rad()
    near = (torch.cos(angle[:, None] - centres[None, :, None, None]) - 0.5).clamp(min=0)
    return (near * chroma[:, None]).mean((2, 3))


def _edges(light: Tensor) -> Tensor:
    """Of brightness [B, 1, H, W], [B, 4]."""
    across, down = light.diff(dim=3)[:, :, 1:], light.diff(dim=2)[:, :, :, 1:]
    strength = (across.square() + down.square()).sqrt()
    parts = (across.abs(), down.abs(), (strength > 0.1).float())
    return torch.cat([*(part.mean((1, 2, 3))[:, None] for part in parts), strength.flatten(1).std(1)[:, None]], dim=1)


def _pixels(pictures: Sequence[Image.Image], side: int) -> Tensor:
    """float32 [B, 3, side, side] in [0, 1]; a picture of that size is not resampled."""
    whole = (side, side)
    squeezed = [
        picture.convert("RGB") if picture.size == whole else picture.convert("RGB").resize(whole, _AREA)
        for picture in pictures
    ]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in squeezed])).permute(0, 3, 1, 2) / 255.0


_AREA = Image.Resampling.BOX
