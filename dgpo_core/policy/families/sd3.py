"""SD3 and SD3.5: flow, two CLIPs and (optionally) T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dgpo_core.diffusion.prediction import Flow, Prediction
from dgpo_core.policy.pipeline import CLIP_G, CLIP_L, T5, VAE_MARKS, DiffusersPolicy, dynamic_mu

_T5_TOKENS = 128  # as the paper's authors train and draw; diffusers' own default is 256


class SD3(DiffusersPolicy):
    """Stable Diffusion 3 and 3.5. Without T5 (`text_encoder_3` None) no T5 tokens are appended, as ComfyUI does.

    (diffusers' own pipeline appends zeros there, which the network was not trained on; pass it `prompt_embeds` of this
    class to get the same images.)
    """

    family = "sd3"
    pipeline_classes = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    )
    network_name = "transformer"
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    architecture = "stable-diffusion-3"
    base_version = "sd3"
    marks = ("joint_blocks.0.context_block.adaLN_modulation.1.bias",)
    input_layer = "x_embedder.proj.weight"
    other_inputs = {17: "an inpainting model", 32: "a ControlNet or an editing model"}  # noqa: RUF012
    parts = {  # noqa: RUF012 - as in the base class
        "text_encoder": (CLIP_L,),
        "text_encoder_2": (CLIP_G,),
        "text_encoder_3": (T5,),
        "vae": VAE_MARKS,
    }
    text_encoder_names = ("text_encoder", "text_encoder_2")
    patch = 2

    def _prediction(self) -> Prediction:
        return Flow(num_train_timesteps=self.scheduler_config.get("num_train_timesteps", 1000))

    def _encode(self, text: str) -> dict[str, Tensor]:
        with_t5 = self.pipe.text_encoder_3 is not None
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            prompt=text,
            prompt_2=None,
            prompt_3=None,
            device=self.pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=min(_T5_TOKENS, self.pipe.tokenizer_3.model_max_length) if with_t5 else 1,
        )
        if not with_t5:
            tokens = tokens[:, :-1]  # the zeros that stand for T5
        return {"tokens": tokens, "pooled": pooled}

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.network(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=cond["tokens"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]

    def _solver_options(self, steps: int, latent: tuple[int, int, int]) -> dict[str, Any]:
        return {"mu": dynamic_mu(self.scheduler_config, latent, patch=self.network.config.patch_size)}
