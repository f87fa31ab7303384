"""Sana: flow, linear attention, prompts that Gemma 2 reads below an instruction, latents of a VAE that halves five
times."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dgpo_core.common.errors import UserError
from dgpo_core.common.sending import sent
from dgpo_core.policy.families.flow import FlowPolicy
from dgpo_core.policy.families.language import mask_of
from dgpo_core.policy.lora.names import Place, of_blocks
from dgpo_core.policy.vae import Latents

_TOKENS = 300  # diffusers' default max_sequence_length
_NEGATIVE = "\0negative\0"  # what a text begins with that is read as a negative prompt; no prompt has this in it

_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",), "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",), "mlp.inverted_conv.conv": ("ff.conv_inverted",),
    "mlp.depth_conv.conv": ("ff.conv_depth",), "mlp.point_conv.conv": ("ff.conv_point",),
}  # fmt: skip
_ENDS = {
    "x_embedder.proj": "patch_embed.proj", "t_block.1": "time_embed.linear", "final_layer.linear": "proj_out",
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1", "y_embedder.y_proj.fc2": "caption_projection.linear_2",
}  # fmt: skip


class _OfDeepVae(Latents):
    """Of an AutoencoderDC, which knows no spread: an image has one latent."""

    @property
    def factor(self) -> int:
        return 2 ** (len(self.vae.config.encoder_block_out_channels) - 1)

    def encode(self, image: Tensor) -> Tensor:
        z: Tensor = self.vae.encode(image, return_dict=False)[0]
        return z


class Sana(FlowPolicy):
    """Sana and Sana 1.5, as diffusers folders. Not Sana Sprint, which is trained on another path than a flow's.

    As in its pipeline, a prompt is read below an instruction to a language model, of which the network is then given no
    more than the last token, and a negative prompt is read without it. The network gets as many tokens as a prompt has;
    in a batch the shorter ones are filled up, and `mask` says by how much.
    """

    family = "sana"
    latents_class = _OfDeepVae
    pipeline_classes = ("SanaPipeline", "SanaPAGPipeline")
    other_pipelines = {  # noqa: RUF012 - as in the base class
        "SanaSprintPipeline": "Sana Sprint, a trigflow model, which cannot be trained here: take Sana",
        "SanaSprintImg2ImgPipeline": "Sana Sprint, a trigflow model, which cannot be trained here: take Sana",
    }
    architecture = "sana-v1"
    base_version = "sana_v1"
    marks = ()  # a single file in its makers' names is refused by `recognise`
    input_layer = "x_embedder.proj.weight"
    parts = {"text_encoder": (), "vae": ()}  # noqa: RUF012 - as in the base class
    repeated_blocks = ("SanaTransformerBlock",)
    patch = 1
    example = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"

    def __init__(self, pipe: Any, *, dtype: torch.dtype, **options: Any) -> None:
        if dtype == torch.float16:
            raise UserError(
                "Sana does not work in float16, where its text encoder and its VAE overflow: set model.dtype to"
                " bfloat16 or float32."
            )
        super().__init__(pipe, dtype=dtype, **options)

    @classmethod
    def makers_names(cls, network: Any, own: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
        yield from of_blocks(network, "blocks", "transformer_blocks", _BLOCK)
        yield from ((name, Place((module,))) for name, module in _ENDS.items())

    def negative_text(self, negative: str) -> str:
        return _NEGATIVE + negative

    def _encode(self, text: str) -> dict[str, Tensor]:
        # the pipeline's own `encode_prompt` fills up to 300 tokens and more, of which the network sees none
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        asked, most = text.removeprefix(_NEGATIVE).lower().strip(), _TOKENS
        if not text.startswith(_NEGATIVE):
            before = instruction(type(self.pipe))
            asked, most = before + asked, len(tokenizer.encode(before)) + _TOKENS - 2
        found = tokenizer([asked], max_length=most, truncation=True, return_tensors="pt").to(encoder.device)
        hidden = encoder(input_ids=found.input_ids, attention_mask=found.attention_mask)[0]
        tokens = torch.cat([hidden[:, :1], hidden[:, most - _TOKENS + 1 :]], 1)
        return {"tokens": tokens, "mask": mask_of(tokens)}

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = self.network(
            x,
            encoder_hidden_states=cond["tokens"],
            encoder_attention_mask=sent(cond["mask"], x.device),
            timestep=t * self.network.config.timestep_scale,
            return_dict=False,
        )[0]
        return found[:, : x.shape[1]]  # some networks have as many channels again, for a spread that nothing uses

    def _solver_options(self, steps: int, latent: tuple[int, int, int]) -> dict[str, Any]:
        return {}  # its pipeline leaves the levels to the scheduler


def instruction(pipeline: type) -> str:
    """What is put before a prompt: a default of the pipeline's call, found nowhere else."""
    lines: list[str] = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)
