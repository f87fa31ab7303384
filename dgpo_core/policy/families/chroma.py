"""Chroma: a Flux without guidance and without CLIP, whose T5 tokens count up to the first that fills the prompt up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dgpo_core.policy.families import parts as parts_of
from dgpo_core.policy.families.flow import FlowPolicy
from dgpo_core.policy.families.flux import FLUX_DOUBLE, FLUX_SINGLE, position_ids
from dgpo_core.policy.families.language import by_length, mask_of
from dgpo_core.policy.families.patches import pack, unpack
from dgpo_core.policy.lora.names import Place, of_blocks

_T5_TOKENS = 512  # diffusers' default max_sequence_length


class Chroma(FlowPolicy):
    """Chroma1-HD, -Base and -Flash (Apache-2.0).

    The network is given the tokens of a prompt and one that fills it up, and no more: that is how its makers train it,
    and what ComfyUI does. (diffusers' own pipeline means the same, but adds its mask of ones and zeros to the attention
    as a number, so that it sees all 512, and leaves it out of single blocks that are recomputed; pass it
    `prompt_embeds` of this class to get the same images.) So texts of one length go through the network together,
    without a mask.
    """

    family = "chroma"
    pipeline_classes = ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline")
    architecture = "chroma"
    base_version = "chroma"
    marks = ("distilled_guidance_layer.norms.0.scale", "distilled_guidance_layer.norms.0.weight")
    input_layer = "img_in.weight"
    packing = 4
    parts = {"text_encoder": (parts_of.T5,), "vae": parts_of.VAE}  # noqa: RUF012 - as in the base class
    kept_whole = ("linear_1", "linear_2")  # of the layers that make the modulation of every block
    example = "lodestones/Chroma1-HD"

    @classmethod
    def makers_names(cls, network: Any, own: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
        yield from of_blocks(network, "double_blocks", "transformer_blocks", FLUX_DOUBLE)
        yield from of_blocks(network, "single_blocks", "single_transformer_blocks", FLUX_SINGLE)
        for i in range(len(network.distilled_guidance_layer.layers)):
            for theirs, ours in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
                layer = f"distilled_guidance_layer.layers.{i}"
                yield f"{layer}.{theirs}", Place((f"{layer}.{ours}",))
        ends = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
        yield from ((name, Place((module,))) for name, module in ends.items())

    def _encode(self, text: str) -> dict[str, Tensor]:
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        found = tokenizer(
            [text],
            padding="max_length",
            max_length=min(_T5_TOKENS, tokenizer.model_max_length),
            truncation=True,
            return_tensors="pt",
        )
        device = encoder.device
        hidden = encoder(found.input_ids.to(device), attention_mask=found.attention_mask.to(device))[0]
        tokens = hidden[:, : int(found.attention_mask.sum()) + 1]
        return {"tokens": tokens, "mask": mask_of(tokens)}

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        height, width = x.shape[-2:]
        image_ids = self._constant(("image_ids", height, width), lambda: position_ids(height // 2, width // 2))
        packed, level = pack(x), t / self.prediction.num_train_timesteps
        parts, order = [], []
        for length, rows in by_length(cond["mask"]):
            tokens = cond["tokens"][rows, :length]
            text_ids = self._constant(("text_ids", length), lambda n=length: torch.zeros(n, 3))  # type: ignore[misc]
            parts.append(
                self.network(
                    hidden_states=packed[rows],
                    timestep=level[rows],
                    encoder_hidden_states=tokens,
                    txt_ids=text_ids,
                    img_ids=image_ids,
                    return_dict=False,
                )[0]
            )
            order += rows
        back = sorted(range(len(order)), key=order.__getitem__)
        return unpack(torch.cat(parts)[back], height, width)
