"""SD3 and SD3.5: flow, two CLIPs and (optionally) T5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from dgpo_core.common.errors import UserError
from dgpo_core.policy.families import parts as parts_of
from dgpo_core.policy.families.flow import FlowPolicy, dynamic_mu
from dgpo_core.policy.lora.names import Place

_T5_TOKENS = 128  # as the paper's authors train and draw; diffusers' own default is 256

_SD3_BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn.proj": ("attn.to_out.0",), "x_block.attn2.proj": ("attn2.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.mlp.fc1": ("ff.net.0.proj",), "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",), "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",), "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}  # fmt: skip
_SD3 = {
    "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder", "final_layer.linear": "proj_out",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
}  # fmt: skip


class SD3(FlowPolicy):
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
    architecture = "stable-diffusion-3"
    base_version = "sd3"
    marks = ("joint_blocks.0.context_block.adaLN_modulation.1.bias",)
    input_layer = "x_embedder.proj.weight"
    other_inputs = {17: "an inpainting model", 32: "a ControlNet or an editing model"}  # noqa: RUF012
    parts = {  # noqa: RUF012 - as in the base class
        "text_encoder": (parts_of.CLIP_L,),
        "text_encoder_2": (parts_of.CLIP_G,),
        "text_encoder_3": (parts_of.T5,),
        "vae": parts_of.VAE,
    }
    optional_parts = ("text_encoder_3",)  # it is trained to do without T5, and files without it are common
    repeated_blocks = ("JointTransformerBlock",)
    text_encoder_names = ("text_encoder", "text_encoder_2")

    @classmethod
    def makers_names(cls, network: Any, own: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
        last = len(network.transformer_blocks) - 1
        for i in range(last + 1):
            for name, modules in _SD3_BLOCK.items():
                swapped = i == last and name == "context_block.adaLN_modulation.1"  # its text stream ends there
                yield f"joint_blocks.{i}.{name}", Place(tuple(f"transformer_blocks.{i}.{m}" for m in modules), swapped)
        yield from ((name, Place((module,))) for name, module in _SD3.items())
        yield "final_layer.adaLN_modulation.1", Place(("norm_out.linear",), swapped=True)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        shape = super().latent_shape(height, width)
        most = self.network.config.pos_embed_max_size * self.patch * self._factor
        if max(height, width) > most:
            raise UserError(f"Images of this model have at most {most} pixels a side, not {height} x {width}.")
        return shape

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
