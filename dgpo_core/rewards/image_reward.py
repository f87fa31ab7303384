"""ImageReward v1.0: which image people prefer for the prompt, by BLIP with a head trained on their rankings."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from dgpo_core.common.errors import UserError
from dgpo_core.common.pictures import to_pil
from dgpo_core.rewards.aesthetic import Predictor
from dgpo_core.rewards.clip import preprocess
from dgpo_core.rewards.model import ModelReward
from dgpo_core.rewards.weight_files import Weights, find_file, load_helper, load_tensors

WEIGHTS = Weights("zai-org/ImageReward", "1.8 GB", file="ImageReward.pt")
TOKENIZER = Weights("google-bert/bert-base-uncased", "its tokenizer, 1 MB", option="tokenizer")
TOKENS = 35  # of a prompt, at most
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's numbers on the authors' test set
HEAD = 64  # numbers per attention head, in both networks

VISION_KEYS = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)
"""BLIP's own names of its image encoder's weights -> transformers'. Those of the text encoder are the same in both."""


class ImageReward(ModelReward):
    """About -2 (bad) to 2 (good), 0 for a middling picture.

    path: a local ImageReward.pt; tokenizer: folder or hub id of BERT's (uncased). dtype: of the two encoders, the head
    is float32; batch: see `ModelReward`.
    Source: https://github.com/THUDM/ImageReward, https://arxiv.org/abs/2304.05977.
    """

    range = (float("-inf"), float("inf"))
    licence = "Apache-2.0"
    weights = (WEIGHTS, TOKENIZER)
    file_option = "path"

    def __init__(
        self, device: str = "cpu", path: str = "", tokenizer: str = "", dtype: str = "auto", batch: int = 8
    ) -> None:
        super().__init__(device, dtype, batch)
        self.vision, self.text, self.head = load_parts(find_file(WEIGHTS, path, "image_reward"))
        self.vision.to(self.dtype)
        self.text.to(self.dtype)
        self.tokenizer = load_helper(AutoTokenizer, TOKENIZER, tokenizer, "image_reward")

    def networks(self) -> Sequence[nn.Module]:
        return (self.vision, self.text, self.head)

    def score_batch(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        side = self.vision.config.image_size
        pixels = torch.stack([preprocess(to_pil(image), side) for image in images]).to(self.device, self.dtype)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        words = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        read = self.text(
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        return (self.head(read[:, 0].float()) - MEAN) / STD


def load_parts(path: Path) -> tuple[BlipVisionModel, BlipTextModel, Predictor]:
    """Image encoder, text encoder and head of a weights file, in float32. Raises UserError for another file."""
    state = load_tensors(path)
    try:
        image, words = _renamed(_under(state, "blip.visual_encoder.")), _under(state, "blip.text_encoder.")
        vision, text = BlipVisionModel(_vision(image)), BlipTextModel(_text(words), add_pooling_layer=False)
        lacking = [*_load(vision, image), *_load(text, words)]
        head = Predictor.of(_under(state, "mlp."))
    except (KeyError, IndexError, RuntimeError):
        lacking = ["all"]
    if lacking:
        raise UserError(f"{path} is not ImageReward v1.0 (ImageReward.pt): download it again.")
    return vision, text, head


def _vision(state: Mapping[str, Tensor]) -> BlipVisionConfig:
    width, _, _, patch = state["embeddings.patch_embedding.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(state, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=width // HEAD,
        image_size=patch * math.isqrt(state["embeddings.position_embedding"].shape[1] - 1),
        patch_size=patch,
        layer_norm_eps=1e-6,  # BLIP's own; transformers' default is another
    )


def _text(state: Mapping[str, Tensor]) -> BlipTextConfig:
    words, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(state, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=width // HEAD,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        is_decoder=True,  # what transformers calls a text encoder with cross attention
    )


def _layers(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({found.group(1) for name in state if (found := re.match(pattern, name))})


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        for pattern, new in VISION_KEYS:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    return found


def _load(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Fills a network; returns the names of its parameters that `state` lacks."""
    network.load_state_dict(state, strict=False)
    network.to(torch.float32).eval().requires_grad_(False)
    return [name for name, _ in network.named_parameters() if name not in state]
