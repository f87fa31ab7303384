"""Flux: flow with a dynamic shift, CLIP's pooled output and T5's tokens, packed latents, embedded guidance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dgpo_core.policy.families import parts as parts_of
from dgpo_core.policy.families.flow import FlowPolicy
from dgpo_core.policy.families.patches import pack, unpack
from dgpo_core.policy.lora.names import Place, of_blocks

_T5_TOKENS = 512  # diffusers' default max_sequence_length

FLUX_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",), "img_mod.lin": ("norm1.linear",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}  # fmt: skip
FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear1_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}  # fmt: skip
_FLUX = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}  # fmt: skip


class Flux(FlowPolicy):
    """Flux.1 dev and schnell. `guidance` is embedded where the network has a place for it (dev).

    Latents are [B,C,h,w] everywhere; only the network sees them packed in 2 x 2 patches.
    """

    family = "flux"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    architecture = "flux-1-dev"
    base_version = "flux1"
    marks: ClassVar[tuple[str, ...]] = (
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "double_blocks.0.img_attn.norm.key_norm.weight",
    )
    input_layer = "img_in.weight"
    other_inputs = {384: "Flux Fill, which fills in", 128: "Flux Depth or Canny"}  # noqa: RUF012
    packing = 4
    parts = {"text_encoder": (parts_of.CLIP_L,), "text_encoder_2": (parts_of.T5,), "vae": parts_of.VAE}  # noqa: RUF012
    text_encoder_names = ("text_encoder", "text_encoder_2")

    @classmethod
    def makers_names(cls, network: Any, own: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
        yield from of_blocks(network, "double_blocks", "transformer_blocks", FLUX_DOUBLE)
        yield from of_blocks(network, "single_blocks", "single_transformer_blocks", FLUX_SINGLE)
        yield from ((name, Place((module,))) for name, module in _FLUX.items())
        yield "final_layer.adaLN_modulation.1", Place(("norm_out.linear",), swapped=True)

    def _encode(self, text: str) -> dict[str, Tensor]:
        tokens, pooled, _ = self.pipe.encode_prompt(
            prompt=text,
            device=self.pipe.text_encoder_2.device,
            max_sequence_length=min(_T5_TOKENS, self.pipe.tokenizer_2.model_max_length),
        )
        return {"tokens": tokens, "pooled": pooled}

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return unpack(self._velocity(x, t, cond), *x.shape[-2:])

    def _velocity(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor], source: Tensor | None = None) -> Tensor:
        """The network's answer for x [B,C,h,w], packed. source: latents [B,C,h',w'] that it sees besides."""
        tokens, packed = cond["tokens"], pack(x)
        text_ids = self._constant(("text_ids", tokens.shape[1]), lambda: torch.zeros(tokens.shape[1], 3))
        seen, ids = [packed], [self._image_ids(x, 0)]
        if source is not None:
            seen, ids = [packed, pack(source)], [*ids, self._image_ids(source, 1)]
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((len(x),), self.guidance, device=x.device, dtype=torch.float32)
        answer = self.network(
            hidden_states=torch.cat(seen, dim=1),
            timestep=t / self.prediction.num_train_timesteps,
            guidance=guidance,
            pooled_projections=cond["pooled"],
            encoder_hidden_states=tokens,
            txt_ids=text_ids,
            img_ids=torch.cat(ids),
            return_dict=False,
        )[0]
        return answer[:, : packed.shape[1]]

    def _image_ids(self, latents: Tensor, picture: int) -> Tensor:
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        return self._constant(("image_ids", picture, rows, columns), lambda: position_ids(rows, columns, picture))


def position_ids(rows: int, columns: int, picture: int = 0) -> Tensor:
    """(picture, row, column) of every token, [rows * columns, 3]; picture: 0 is what is drawn, 1 what it is made of."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 0] = picture
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.view(-1, 3)
