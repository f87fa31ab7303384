"""FLUX.2 klein and dev: flow, prompts read by a language model at three depths, latents of 2 x 2 patches; they edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dgpo_core.common.prompts import Prompt
from dgpo_core.policy.base import Cond
from dgpo_core.policy.families.flow import FlowPolicy
from dgpo_core.policy.families.sources import SourceLatents, beside, require_as_many
from dgpo_core.policy.lora.names import Place, of_blocks
from dgpo_core.policy.vae import Latents

_TOKENS = 512  # diffusers' default max_sequence_length
_MOST_SINGLE_BLOCKS = 48  # of dev
_APART = 10  # of two pictures, as diffusers' own pipeline has it

_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.linear_in",), "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",), "txt_mlp.2": ("ff_context.linear_out",),
}  # fmt: skip
_SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
_ENDS = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
}  # fmt: skip


class _OfPatches(Latents):
    """Four places of the VAE's are one, as its batch norm leaves them."""

    @property
    def channels(self) -> int:
        return 4 * super().channels

    @property
    def factor(self) -> int:
        return 2 * super().factor

    def scale(self, device: torch.device) -> tuple[Tensor | float, Tensor | float]:
        norm = self.vae.bn
        spread = (norm.running_var.float() + self.vae.config.batch_norm_eps).sqrt()
        return 1 / spread.view(1, -1, 1, 1).to(device), norm.running_mean.float().view(1, -1, 1, 1).to(device)

    def decode(self, z: Tensor) -> Tensor:
        b, c, h, w = z.shape
        return super().decode(z.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w))

    def encode(self, image: Tensor) -> Tensor:
        z = super().encode(image)
        b, c, h, w = z.shape
        return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


class Flux2(FlowPolicy):
    """FLUX.2 klein (4B: Apache-2.0; 9B: FLUX non-commercial) and dev (FLUX non-commercial).

    klein is distilled to 4 steps without guidance, klein-base is not. dev takes `guidance` as an input. A latent
    [B,128,h,w] is four of the VAE's in one, so that a place is 16 pixels wide; it is drawn, and trained, as the VAE's
    batch norm leaves it. A prompt always has 512 tokens: what fills it up is attended to, as it was in its training.

    A prompt may bring up to four pictures, and all prompts of a training as many; their latents are further tokens,
    each picture's at a time of its own. They have the proportions of what is drawn, and are scaled to its size.
    (diffusers' own pipeline takes them at their own.)
    """

    family = "flux2"
    latents_class = _OfPatches
    pipeline_classes = ("Flux2KleinPipeline", "Flux2Pipeline")
    built_as_named = True
    sources = (0, 4)
    architecture = "flux-2"
    base_version = "flux2"
    marks = ("double_stream_modulation_img.lin.weight",)
    bare_names = True
    targets = (
        *FlowPolicy.targets,
        "to_qkv_mlp_proj",  # the single blocks, which are most, have q, k, v and what goes into the MLP in one layer
        *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(_MOST_SINGLE_BLOCKS)),
    )
    input_layer = "img_in.weight"
    packing = 4
    patch = 1
    parts = {"text_encoder": (), "vae": ()}  # noqa: RUF012 - as in the base class
    example = "black-forest-labs/FLUX.2-klein-base-4B"

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        self._source_latents = SourceLatents(self)

    @classmethod
    def makers_names(cls, network: Any, own: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
        yield from of_blocks(network, "double_blocks", "transformer_blocks", _DOUBLE)
        yield from of_blocks(network, "single_blocks", "single_transformer_blocks", _SINGLE)
        yield from ((name, Place((module,))) for name, module in _ENDS.items())
        yield "final_layer.adaLN_modulation.1", Place(("norm_out.linear",), swapped=True)

    @property
    def default_size(self) -> tuple[int, int]:
        side: int = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    def check_sources(self, prompts: Sequence[Prompt], size: tuple[int, int]) -> None:
        super().check_sources(prompts, size)
        require_as_many(prompts, self.family)

    def condition(self, prompts: Sequence[Prompt], negative: str, size: tuple[int, int]) -> tuple[list[Cond], Cond]:
        conds, uncond = super().condition(prompts, negative, size)
        if not any(prompt.sources for prompt in prompts):
            return conds, uncond
        return beside(conds, [uncond] * len(prompts), self._source_latents.together(prompts, size))

    def _encode(self, text: str) -> dict[str, Tensor]:
        tokens, _ = self.pipe.encode_prompt(
            text,
            device=self.pipe.text_encoder.device,
            max_sequence_length=min(_TOKENS, getattr(self.pipe.tokenizer, "model_max_length", _TOKENS)),
        )
        return {"tokens": tokens}

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        height, width = x.shape[-2:]
        length, pictures = cond["tokens"].shape[1], x[:, None]
        if "source" in cond:
            pictures = torch.cat([pictures, cond["source"].to(x.dtype)], 1)
        count = pictures.shape[1]
        # whole numbers: bfloat16 has not all of them above 256, and a prompt's places go on to 511
        image_ids = self._constant(
            ("image_ids", count, height, width), lambda: _places(count, height, width), torch.int64
        )
        text_ids = self._constant(("text_ids", length), lambda: _grid(1, 1, 1, length), torch.int64)
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((len(x),), self.guidance, device=x.device, dtype=torch.float32)
        tokens = self.network(
            hidden_states=pictures.transpose(1, 2).flatten(2).transpose(1, 2),
            timestep=t / self.prediction.num_train_timesteps,
            guidance=guidance,
            encoder_hidden_states=cond["tokens"],
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return tokens[:, : height * width].transpose(1, 2).unflatten(2, (height, width))

    def _solver_options(self, steps: int, latent: tuple[int, int, int]) -> dict[str, Any]:
        options = super()._solver_options(steps, latent)
        return {**options, "mu": _empirical_mu(latent[1] * latent[2], steps)}


def _grid(*lengths: int) -> Tensor:
    """The four coordinates of every token, [product of lengths, 4]: time, row, column, place in the text."""
    return torch.cartesian_prod(*(torch.arange(length) for length in lengths))


def _places(count: int, height: int, width: int) -> Tensor:
    """Of the noisy latent's tokens, and of each source's, which are ten apart in time: [count * height * width, 4]."""
    return _grid(count, height, width, 1) * torch.tensor([_APART, 1, 1, 1])


def _empirical_mu(tokens: int, steps: int) -> float:
    """The exponent of the shift, by the number of image tokens and of steps.

    Source: `compute_empirical_mu` of diffusers' FLUX.2 pipeline, which has it from the authors' code.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return slope * steps + at_200 - 200 * slope
