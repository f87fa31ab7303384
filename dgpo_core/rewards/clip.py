"""CLIP by transformers: what CLIP score, PickScore, the aesthetic predictor and GenEval's colours share."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from dgpo_core.common.pictures import to_pil
from dgpo_core.rewards import clip_file
from dgpo_core.rewards.model import ModelReward
from dgpo_core.rewards.published import CLIP_L_WORDS
from dgpo_core.rewards.weight_files import Weights, load_helper, load_network, one_file

OPENAI = "quick_gelu"
LAION = "gelu"
"""The activation in the feed-forward layers of OpenAI's models, and of LAION's; their config.json say so."""
# OpenAI's normalisation; the LAION models in OpenCLIP's and transformers' format have the same
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """A CLIPModel with its tokenizer and its preprocessing; `scale` is its exp(logit_scale).

    given: what the reward's option says of the model (see `weights.find`). tokenizer: of its tokenizer, if elsewhere,
    the weights and what their option says. activation: of a model in one file, which does not say it. reward: for
    messages. Sources:
    https://huggingface.co/openai/clip-vit-large-patch14 (model card), https://arxiv.org/abs/2103.00020.
    """

    def __init__(
        self,
        weights: Weights,
        given: str,
        dtype: torch.dtype,
        reward: str,
        tokenizer: tuple[Weights, str] | None = None,
        activation: str = OPENAI,
    ) -> None:
        file = one_file(weights, given)
        model = clip_file.load(file, activation) if file else load_network(CLIPModel, weights, given, reward)
        tokenizer = tokenizer or ((CLIP_L_WORDS, "") if file else (weights, given))
        self.scale = float(model.logit_scale.float().exp())  # before it is rounded
        self.model = model.to(dtype)
        self.tokenizer = load_helper(AutoTokenizer, *tokenizer, reward)
        self.side: int = self.model.config.vision_config.image_size
        self.tokens: int = self.model.config.text_config.max_position_embeddings

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit-length embeddings float32 [B, D] of pictures of any sizes."""
        pixels = torch.stack([preprocess(picture, self.side) for picture in pictures])
        features = self.model.get_image_features(pixel_values=pixels.to(self.model.device, self.model.dtype))
        return _unit(features)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit-length embeddings float32 [B, D]; texts are cut off at the model's 77 tokens."""
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.tokens, return_tensors="pt")
        batch = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return _unit(self.model.get_text_features(**batch))

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine float32 [B] of each image with its own prompt; images float [B, 3, H, W] in [0, 1]."""
        distinct = list(dict.fromkeys(prompts))  # a group has one prompt for all its images
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.model.device)
        return (self.images([to_pil(image) for image in images]) * self.texts(distinct)[rows]).sum(-1)


class ClipReward(ModelReward):
    """A reward that is one CLIP model, `weights[0]`, which the option `path` names: a folder, a hub id or one file."""

    file_option = "path"

    @classmethod
    def sources(cls, options: Mapping[str, Any]) -> list[tuple[Weights, Any]]:
        model = (cls.weights[0], options.get("path", ""))
        return [model, (CLIP_L_WORDS, "")] if one_file(*model) else [model]

    @classmethod
    def require(cls, options: Mapping[str, Any]) -> None:
        """Raises UserError for a file that is no CLIP model."""
        file = one_file(cls.weights[0], options.get("path", ""))
        if file:
            clip_file.check(file)


def preprocess(picture: Image.Image, side: int) -> Tensor:
    """float32 [3, side, side]: shorter edge to `side` (bicubic), centre crop, OpenAI's normalisation.

    Equal to CLIP's image processor on Pillow, which is what published scores were computed with.
    """
    picture = picture.convert("RGB")
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    long = int(side * long / short)
    picture = picture.resize((side, long) if width <= height else (long, side), Image.Resampling.BICUBIC)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    pixels = np.asarray(picture.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    return torch.from_numpy((pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).permute(2, 0, 1)


def _unit(features: Any) -> Tensor:
    # transformers 5 returns an object that holds the projected embedding; 4 returned the embedding
    embedding: Tensor = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(embedding.float(), dim=-1)
