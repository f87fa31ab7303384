"""Features that a test can see through: red, green and blue of a picture, and the length of its prompt."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dgpo_core.rewards.taste.features import Features


class MeanColour(Features):
    """Red, green and blue are told apart; the prompt is the same within a group, and so tells nothing."""

    kind = "built-in"
    blocks = (("colour", 3), ("prompt", 1))

    def of(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        colours = [np.asarray(picture.convert("RGB")).mean((0, 1)) / 255 for picture in pictures]
        lengths = torch.tensor([[float(len(prompt))] for prompt in prompts])
        return torch.cat([torch.tensor(np.array(colours), dtype=torch.float32), lengths], dim=1)
