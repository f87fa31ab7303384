"""Which sizes the images of a model can have, by its configs: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import kind_at
from dgpo_core.policy.families import FAMILIES
from dgpo_core.policy.loading.folder import Folder
from dgpo_core.policy.loading.load import family_of


@dataclass(frozen=True)
class ImageLimits:
    """unit: a side is a multiple of it; most: pixels of a side, 0 where no limit is known."""

    unit: int
    most: int = 0

    def check(self, side: str, pixels: int) -> None:
        """Raises UserError for a size that cannot be; 0 is the model's own. side: what it is called."""
        if pixels and pixels % self.unit:
            raise UserError(f"{side} is {pixels}, but images of this model have multiples of {self.unit} pixels.")
        if self.most and pixels > self.most:
            raise UserError(f"{side} is {pixels}, but images of this model have at most {self.most} pixels a side.")


def image_limits(path: str | Path) -> ImageLimits:
    """Of a .safetensors file or a diffusers folder. Raises UserError where it cannot be trained."""
    family = FAMILIES[family_of(path)]
    if kind_at(path, "The model") != "folder":
        return ImageLimits(8 * family.patch)
    folder = Folder(str(path))
    factor = 2 ** (len(folder.config("vae/config.json").get("block_out_channels", [0] * 4)) - 1)
    positions = folder.config(f"{family.network_name}/config.json").get("pos_embed_max_size") or 0
    return ImageLimits(factor * family.patch, positions * factor * family.patch)
