"""HPS v2.1: which image people prefer for the prompt, by a CLIP-H trained on their choices among generated images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, pad

from dgpo_core.common.errors import UserError
from dgpo_core.rewards.base import need_packages
from dgpo_core.rewards.clip import MEAN, STD
from dgpo_core.rewards.model import ModelReward
from dgpo_core.rewards.weight_files import Weights, find_file, load_tensors

WEIGHTS = Weights("xswu/HPSv2", "3.9 GB", file="HPS_v2.1_compressed.pt")
VISION_HEAD, TEXT_HEAD = 80, 64  # numbers per attention head in ViT-H-14, which the weights do not say


class HpsV2(ModelReward):
    """The cosine of image and prompt in HPS v2.1's ViT-H-14, mostly 0.2 to 0.35; comparable for one prompt only.

    As its authors score, the whole image counts: it is scaled to 224 pixels at its longer side and padded with black.
    path: a local HPS_v2.1_compressed.pt. dtype, batch: see `ModelReward`.
    Source: https://github.com/tgxs002/HPSv2, https://arxiv.org/abs/2306.09341.
    """

    range = (-1.0, 1.0)
    licence = "Apache-2.0"
    weights = (WEIGHTS,)
    file_option = "path"
    packages: ClassVar[Mapping[str, str]] = {"open_clip": "open_clip_torch"}

    def __init__(self, device: str = "cpu", path: str = "", dtype: str = "auto", batch: int = 8) -> None:
        super().__init__(device, dtype, batch)
        need_packages("hpsv2", self.packages)
        self.model = load_model(find_file(WEIGHTS, path, "hpsv2")).to(self.dtype)
        self.side: int = self.model.visual.image_size[0]

    def networks(self) -> Sequence[nn.Module]:
        return (self.model,)

    def score_batch(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        from open_clip import tokenize

        pixels = preprocess(images, self.side).to(self.device, self.dtype)
        tokens = tokenize(list(prompts), context_length=self.model.context_length).to(self.device)
        seen, read = self.model.encode_image(pixels).float(), self.model.encode_text(tokens).float()
        return (normalize(seen, dim=-1) * normalize(read, dim=-1)).sum(-1)


def preprocess(images: Tensor, side: int) -> Tensor:
    """float32 [B, 3, side, side] of images [B, 3, H, W] in [0, 1]: scaled whole, padded with black, normalised."""
    images = (images.float() * 255).round() / 255  # as they would be read from a file
    zoom = side / max(images.shape[-2:])
    height, width = (round(edge * zoom) for edge in images.shape[-2:])
    images = interpolate(images, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    rows, columns = side - height, side - width
    images = pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def load_model(path: Path) -> Any:
    """OpenCLIP's CLIP with the weights of a file, in float32. Raises UserError where the file holds another network."""
    from open_clip.model import CLIP

    state = load_tensors(path)
    try:
        model = CLIP(**architecture(state))
        missing = model.load_state_dict(state, strict=False).missing_keys
    except (KeyError, IndexError, RuntimeError):
        missing = ["all"]
    if missing:
        raise UserError(f"{path} is not HPS v2.1 (HPS_v2.1_compressed.pt): download it again.")
    return model.eval().requires_grad_(False)


def architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What OpenCLIP needs to know of a CLIP ViT, from the shapes of its weights. Raises KeyError for other weights."""
    width, _, _, patch = state["visual.conv1.weight"].shape
    grid = math.isqrt(len(state["visual.positional_embedding"]) - 1)
    text_width = state["token_embedding.weight"].shape[1]
    return {
        "embed_dim": state["text_projection"].shape[1],
        "vision_cfg": {
            "image_size": patch * grid,
            "layers": _blocks(state, "visual.transformer.resblocks."),
            "width": width,
            "head_width": VISION_HEAD,
            "patch_size": patch,
        },
        "text_cfg": {
            "context_length": len(state["positional_embedding"]),
            "vocab_size": len(state["token_embedding.weight"]),
            "width": text_width,
            "heads": text_width // TEXT_HEAD,
            "layers": _blocks(state, "transformer.resblocks."),
        },
    }


def _blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})
