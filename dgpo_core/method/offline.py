"""Groups that need no roll-out: rated images, read from their files and encoded when an iteration asks for them."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.pixels import Unreadable, read_pixels
from dgpo_core.common.prompts import Prompt, PromptStream
from dgpo_core.common.reading import shown
from dgpo_core.people.gallery import RatedGroup
from dgpo_core.policy.base import Policy
from dgpo_core.settings.config import RATINGS

MOST_CACHED = 2**30  # bytes of latents; those of 1024 x 1024 pixels are 256 KiB each in SDXL, 1 MiB in Flux and SD3


class RatedGroups:
    """The groups of a gallery by iteration: all of them in random order, then again in another order, without end.

    What `at` answers depends on nothing but its argument and what this was made from, so a resumed run needs no state.
    Latents are kept up to `most_cached` bytes, those that were used last, and encoded anew beyond.
    """

    def __init__(
        self, groups: Sequence[RatedGroup], per_iteration: int, seed: int, most_cached: int = MOST_CACHED
    ) -> None:
        self._stream = PromptStream(groups, min(per_iteration, len(groups)), seed)
        self._cache: OrderedDict[RatedGroup, Tensor] = OrderedDict()
        self._most_cached = most_cached

    def at(self, iteration: int) -> list[RatedGroup]:
        """The groups of an iteration, counted from 0."""
        return self._stream.at(iteration)

    def load(self, group: RatedGroup, policy: Policy, size: tuple[int, int]) -> Group:
        """The group with its latents, on the policy's device; its images, which nothing looks at again, are left out.

        size: (height, width) in pixels, which the images are scaled and cropped to.
        """
        if group not in self._cache:
            self._cache[group] = policy.encode_images(read_images(group.files, size).to(policy.device)).cpu()
            self._forget()
        self._cache.move_to_end(group)
        scores = {RATINGS: torch.tensor(group.scores, dtype=torch.float32)}
        latents, n = self._cache[group].to(policy.device), len(group.files)
        prompt = Prompt(group.prompt, sources=group.sources)
        return Group(prompt, tuple(range(n)), latents, torch.empty(n, 3, 0, 0), scores)

    def _forget(self) -> None:
        """The latents that were not used for longest, while there are too many; the newest stay in any case."""
        while len(self._cache) > 1 and sum(latents.nbytes for latents in self._cache.values()) > self._most_cached:
            self._cache.popitem(last=False)


def read_images(files: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Image files as [B, 3, H, W] in [0, 1], scaled to (H, W) with what is too long cropped at both ends.

    Raises UserError naming the file that cannot be read.
    """
    return torch.stack([_read_image(path, size) for path in files])


def _read_image(path: Path, size: tuple[int, int]) -> Tensor:
    height, width = size
    try:
        upright = read_pixels(path)
    except Unreadable as error:
        raise UserError(f"The image {shown(path, 1000)} cannot be read ({error}): remove it from the folder.") from None
    fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return pixels.permute(2, 0, 1).float() / 255.0
