"""Qwen-Image: flow with a dynamic shift, prompts read by Qwen2.5-VL, packed latents of a VAE of videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from dgpo_core.policy.families.flow import FlowPolicy
from dgpo_core.policy.families.frames import OfFrames
from dgpo_core.policy.families.language import mask_of, unless_whole
from dgpo_core.policy.families.patches import pack, unpack

_TOKENS = 1024  # diffusers' most


class QwenImage(FlowPolicy):
    """Qwen-Image and Qwen-Image-2512 (Apache-2.0). Those that edit are in `qwenedit`.

    A prompt has as many tokens as it has; in a batch the shorter ones are filled up, and `mask` says by how much. Its
    makers name the network's modules as diffusers does.
    """

    family = "qwenimage"
    latents_class = OfFrames
    pipeline_classes: ClassVar[tuple[str, ...]] = (
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
    )
    architecture = "qwen-image"
    base_version = "qwen_image"
    marks: ClassVar[tuple[str, ...]] = ("transformer_blocks.0.img_mod.1.weight",)
    bare_names = True
    input_layer = "img_in.weight"
    packing = 4
    parts = {"text_encoder": (), "vae": ()}  # noqa: RUF012 - as in the base class
    example = "Qwen/Qwen-Image"

    def _encode(self, text: str) -> dict[str, Tensor]:
        # the pipeline's own `encode_prompt` picks out the tokens by their values, which tensors without storage lack
        pipe, encoder = self.pipe, self.pipe.text_encoder
        preamble = pipe.prompt_template_encode_start_idx
        found = pipe.tokenizer(
            [pipe.prompt_template_encode.format(text)],
            max_length=pipe.tokenizer_max_length + preamble,
            truncation=True,
            return_tensors="pt",
        ).to(encoder.device)
        hidden = encoder(
            input_ids=found.input_ids, attention_mask=found.attention_mask, output_hidden_states=True
        ).hidden_states[-1]
        tokens = hidden[:, preamble:][:, :_TOKENS]
        return {"tokens": tokens, "mask": mask_of(tokens)}

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        height, width = x.shape[-2:]
        pictures = [x, *(cond["source"].to(x.dtype).unbind(1) if "source" in cond else ())]
        tokens = torch.cat([pack(picture) for picture in pictures], 1)
        packed = self.network(
            hidden_states=tokens,
            timestep=t / self.prediction.num_train_timesteps,
            encoder_hidden_states=cond["tokens"],
            encoder_hidden_states_mask=unless_whole(cond["mask"], x.device),
            img_shapes=[[(1, height // 2, width // 2)] * len(pictures)] * len(x),
            return_dict=False,
        )[0]
        return unpack(packed[:, : tokens.shape[1] // len(pictures)], height, width)

    def guide(self, u: Tensor, c: Tensor, scale: float) -> Tensor:
        """As its pipeline has it: what is guided keeps, patch by patch, the length of the prediction c."""
        towards, alone = pack(super().guide(u, c, scale)), pack(c)
        length = towards.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(towards.dtype).tiny)
        return unpack(towards * (alone.norm(dim=-1, keepdim=True) / length), *c.shape[-2:])
