"""Z-Image and Z-Image-Turbo: flow, a stream of image and text together, prompts read by Qwen3, latents as Flux's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dgpo_core.policy.families import parts as parts_of
from dgpo_core.policy.families.flow import FlowPolicy
from dgpo_core.policy.families.language import lengths, mask_of
from dgpo_core.policy.lora.names import Place, of_blocks

_TOKENS = 512  # diffusers' default max_sequence_length
_PATCH = "2-1"  # diffusers names what depends on the patch (2 x 2 of one frame) by it

_BLOCK = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"), "attention.out": ("attention.to_out.0",),
}  # fmt: skip
_ENDS = {
    "x_embedder": f"all_x_embedder.{_PATCH}", "final_layer.linear": f"all_final_layer.{_PATCH}.linear",
    "final_layer.adaLN_modulation.1": f"all_final_layer.{_PATCH}.adaLN_modulation.1",
}  # fmt: skip


class ZImage(FlowPolicy):
    """Z-Image and Z-Image-Turbo (Apache-2.0). Turbo is distilled to 8 steps and needs no guidance.

    A prompt has as many tokens as it has; in a batch the shorter ones are filled up, and `mask` says by how much.
    """

    family = "zimage"
    pipeline_classes = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
    architecture = "z-image"
    base_version = "zimage"
    marks = ("cap_pad_token", "x_pad_token")  # Lumina 2, which it resembles, has none
    input_layer = "x_embedder.weight"
    parts = {"text_encoder": (), "vae": parts_of.VAE}  # noqa: RUF012 - as in the base class
    example = "Tongyi-MAI/Z-Image-Turbo"
    side = 1024

    @classmethod
    def makers_names(cls, network: Any, own: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
        for blocks in ("layers", "noise_refiner", "context_refiner"):
            yield from of_blocks(network, blocks, blocks, _BLOCK)
        yield from ((name, Place((module,))) for name, module in _ENDS.items())

    def _encode(self, text: str) -> dict[str, Tensor]:
        # the pipeline's own `encode_prompt` picks out the tokens by their values, which tensors without storage lack
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        found = tokenizer(
            [asked],
            padding="max_length",
            max_length=min(_TOKENS, tokenizer.model_max_length),
            truncation=True,
            return_tensors="pt",
        )
        whole = found.attention_mask[0].nonzero().flatten()
        hidden = encoder(
            input_ids=found.input_ids.to(encoder.device),
            attention_mask=found.attention_mask.to(encoder.device).bool(),
            output_hidden_states=True,
        ).hidden_states[-2]
        tokens = hidden[:, whole.to(hidden.device)]
        return {"tokens": tokens, "mask": mask_of(tokens)}

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        # it is told how much of the picture is there, 0 (noise) to 1, and returns x0 - eps: both are turned round
        done = (self.prediction.num_train_timesteps - t) / self.prediction.num_train_timesteps
        texts = [tokens[:length] for tokens, length in zip(cond["tokens"], lengths(cond["mask"]), strict=True)]
        pictures = list(x.unsqueeze(2))  # it takes each alone, with one frame
        found = self.network(pictures, done, texts, return_dict=False)[0]
        return -torch.stack(list(found)).squeeze(2)
