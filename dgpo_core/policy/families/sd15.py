"""SD 1.x and 2.x: epsilon or v, one CLIP, a UNet."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dgpo_core.diffusion.prediction import Prediction, prediction_from_config
from dgpo_core.policy.pipeline import UNET_INPUTS, VAE_MARKS, DiffusersPolicy


class SD15(DiffusersPolicy):
    """Stable Diffusion 1.x and 2.x; the prediction is what the scheduler's config says."""

    family = "sd15"
    pipeline_classes = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
    )
    network_name = "unet"
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    architecture = "stable-diffusion-v1"
    base_version = "sd_v1"
    kinds = ("epsilon", "v", "flow")
    marks = ("input_blocks.0.0.weight",)  # SDXL has it, too, which is looked for first
    input_layer = "input_blocks.0.0.weight"
    other_inputs = UNET_INPUTS
    parts = {  # noqa: RUF012 - as in the base class
        "text_encoder": (
            "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
            "cond_stage_model.model.token_embedding.weight",  # SD2
            "conditioner.embedders.0.model.token_embedding.weight",  # SD2 in sgm's form
        ),
        "vae": VAE_MARKS,
    }

    def _prediction(self) -> Prediction:
        return prediction_from_config(self.scheduler_config, self.device)

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
