"""SD 1.x and 2.x: epsilon or v, one CLIP, a UNet."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dgpo_core.policy.families import parts as parts_of
from dgpo_core.policy.families.unet import UNetPolicy

_SD2_V_MARK = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_WIDTH_MARK = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"


class SD15(UNetPolicy):
    """Stable Diffusion 1.x and 2.x."""

    family = "sd15"
    pipeline_classes = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
    )
    architecture = "stable-diffusion-v1"
    base_version = "sd_v1"
    predicted_by = {"stable-diffusion-v2-768-v": "v", "stable-diffusion-v2-512": "epsilon"}  # noqa: RUF012
    marks = ("input_blocks.0.0.weight",)  # SDXL has it, too, which is looked for first
    parts = {  # noqa: RUF012 - as in the base class
        "text_encoder": (
            "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
            "cond_stage_model.model.token_embedding.weight",  # SD2
            "conditioner.embedders.0.model.token_embedding.weight",  # SD2 in sgm's form
        ),
        "vae": parts_of.VAE,
    }

    @classmethod
    def prediction_of_weights(cls, state: Mapping[str, Tensor]) -> str:
        """Of SD 2.x, which the hub's config for all of it calls v.

        By the spread of one bias, which tells Stability's epsilon and v models apart (ComfyUI's rule for SD20).
        """
        if _SD2_WIDTH_MARK not in state or state[_SD2_WIDTH_MARK].shape[-1] != 1024:
            return ""
        mark = state.get(_SD2_V_MARK)
        return "v" if mark is not None and mark.float().std(unbiased=False) > 0.09 else "epsilon"

    def _encode(self, text: str) -> dict[str, Tensor]:
        device = self.pipe.text_encoder.device
        tokens, _ = self.pipe.encode_prompt(text, device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"tokens": tokens}

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.network(x, t, encoder_hidden_states=cond["tokens"], return_dict=False)[0]

    def _labels(self) -> tuple[str, str]:
        if self.network.config.cross_attention_dim == 1024:  # SD 2.x has a wider CLIP
            return "stable-diffusion-v2", "sd_v2"
        return self.architecture, self.base_version
