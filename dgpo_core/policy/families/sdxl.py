"""SDXL: epsilon or v, two CLIPs, a UNet that is also told the image size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dgpo_core.policy.families import parts as parts_of
from dgpo_core.policy.families.unet import UNetPolicy


class SDXL(UNetPolicy):
    """Stable Diffusion XL. The size conditioning is the image's own size with no crop, as its pipeline has it.

    The empty prompt is encoded as zeros where the pipeline's `force_zeros_for_empty_prompt` says so (SDXL base does):
    that is what the pipeline guides away from when no negative prompt is given.
    """

    family = "sdxl"
    pipeline_classes = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    )
    architecture = "stable-diffusion-xl-v1-base"
    base_version = "sdxl_base_v1-0"
    other_models = {  # noqa: RUF012 - as in the base class
        "requires_aesthetics_score": "an SDXL refiner, which cannot be trained here: take the SDXL base"
    }
    marks = ("label_emb.0.0.weight",)
    parts = {  # noqa: RUF012 - as in the base class
        "text_encoder": ("conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",),
        "text_encoder_2": ("conditioner.embedders.1.model.text_projection",),  # some merges lack this one alone
        "vae": parts_of.VAE,
    }
    text_encoder_names = ("text_encoder", "text_encoder_2")

    def _encode(self, text: str) -> dict[str, Tensor]:
        device = self.pipe.text_encoder.device
        tokens, _, pooled, _ = self.pipe.encode_prompt(text, device=device, do_classifier_free_guidance=False)
        if not text and self.pipe.config.get("force_zeros_for_empty_prompt", False):
            tokens, pooled = torch.zeros_like(tokens), torch.zeros_like(pooled)
        return {"tokens": tokens, "pooled": pooled}

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        height, width = x.shape[-2] * self._factor, x.shape[-1] * self._factor
        sizes = self._constant(("sizes", height, width), lambda: torch.tensor([[height, width, 0, 0, height, width]]))
        added = {"text_embeds": cond["pooled"], "time_ids": sizes.expand(len(x), -1)}
        return self.network(x, t, encoder_hidden_states=cond["tokens"], added_cond_kwargs=added, return_dict=False)[0]
