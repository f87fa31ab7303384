"""HiDream-I1: flow, four text encoders of which Llama gives every layer, feed-forwards of experts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from dgpo_core.common.errors import UserError
from dgpo_core.policy.families.flow import FlowPolicy, dynamic_mu

_TOKENS = 128  # diffusers' default max_sequence_length, of each of the four


class HiDream(FlowPolicy):
    """HiDream-I1 Full, and Dev and Fast, which are distilled. Not the E1s, which edit.

    The network is given the tokens of T5 and those of each layer of Llama, all that fill them up included, and the
    pooled outputs of both CLIPs. Its makers name its modules as diffusers does.

    A picture that is no square is filled up to as many tokens as the largest square has, of which attention sees the
    values with empty keys: so it was trained, and so diffusers draws. (ComfyUI leaves out what fills it up.)
    """

    family = "hidream"
    targets = (
        *("to_q", "to_k", "to_v", "to_out"),
        *("to_q_t", "to_k_t", "to_v_t", "to_out_t"),
    )
    pipeline_classes = ("HiDreamImagePipeline",)
    architecture = "hidream-i1"
    base_version = "hidream_i1"
    marks = ("caption_projection.0.linear.weight", "double_stream_blocks.0.block.adaLN_modulation.1.bias")
    bare_names = True
    input_layer = "x_embedder.proj.weight"
    parts = {  # noqa: RUF012 - as in the base class
        **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"), ()),
        "vae": (),
    }
    brought = {  # noqa: RUF012 - as in the base class
        "text_encoder_4": "the transformers folder of Llama-3.1-8B-Instruct",
        "tokenizer_4": "its tokenizer",
    }
    kept_whole = ("linear",)  # of what brings each text into the network: they are in a list, too, but in no block
    repeated_blocks = ("HiDreamImageTransformerBlock", "HiDreamImageSingleTransformerBlock")
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    example = "HiDream-ai/HiDream-I1-Full"

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        self.network.patchify = MethodType(_patchify, self.network)
        mix_experts(self.network)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        shape = super().latent_shape(height, width)
        side = self._factor * self.patch
        if (height // side) * (width // side) > self.network.max_seq:
            most = " x ".join(map(str, self.default_size))
            raise UserError(f"Images of this model have at most as many pixels as {most}, not {height} x {width}.")
        return shape

    @property
    def default_size(self) -> tuple[int, int]:
        rows, columns = self.network.config.max_resolution
        return self._factor * rows, self._factor * columns

    def _encode(self, text: str) -> dict[str, Tensor]:
        layers = self._layers(text)
        tokens, _, _, _, pooled, _ = self.pipe.encode_prompt(
            prompt=text,
            prompt_embeds_llama3=layers,
            device=self.pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=_TOKENS,
        )
        return {"tokens": tokens, "layers": layers.transpose(0, 1), "pooled": pooled}

    def _layers(self, text: str) -> Tensor:
        """What each layer of Llama makes of a prompt, [layers, 1, L, C].

        The pipeline asks for all attentions besides, which it throws away, and which fast kernels cannot give.
        """
        tokenizer, encoder = self.pipe.tokenizer_4, self.pipe.text_encoder_4
        found = tokenizer(
            [text],
            padding="max_length",
            max_length=min(_TOKENS, tokenizer.model_max_length),
            truncation=True,
            return_tensors="pt",
        ).to(encoder.device)
        states = encoder(found.input_ids, attention_mask=found.attention_mask, output_hidden_states=True).hidden_states
        return torch.stack(states[1:])

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        towards: Tensor = self.network(
            hidden_states=x,
            timesteps=t,
            encoder_hidden_states_t5=cond["tokens"],
            encoder_hidden_states_llama3=cond["layers"].transpose(0, 1),
            pooled_embeds=cond["pooled"],
            return_dict=False,
        )[0]
        return -towards  # it returns x0 - eps

    def _solver_options(self, steps: int, latent: tuple[int, int, int]) -> dict[str, Any]:
        # its pipeline leaves the levels to the scheduler; one that shifts by size is given that of the largest image
        largest = (latent[0], *self.network.config.max_resolution)
        return {"mu": dynamic_mu({}, largest, self.patch, max_shift=1.15)}


def _patchify(network: Any, x: Tensor) -> tuple[Tensor, Tensor | None, list[tuple[int, int]], Tensor]:
    """As the class does, but the number of rows and columns is told in numbers that are not on the device: it is asked
    for them image by image, which a tensor without storage cannot answer, and for which a card would have to wait."""
    tokens, mask, _, ids = type(network).patchify(network, x)
    patch = network.config.patch_size
    return tokens, mask, [(x.shape[-2] // patch, x.shape[-1] // patch)] * len(x), ids


def mix_experts(network: nn.Module) -> None:
    """Has the feed-forwards of experts in a network of diffusers' or of ComfyUI's, which took the class over, answer by
    `of_experts`."""
    for module in network.modules():
        if type(module).__name__ == "MOEFeedForwardSwiGLU":
            module.forward = MethodType(of_experts, module)


def of_experts(layer: Any, x: Tensor) -> Tensor:
    """What a feed-forward of experts makes of x [B,L,C], and its gradient.

    diffusers' class has two forwards. The one of a network in training mode knows a gradient, but such a network gives
    its answer in patches; the other is without any, so that no layer before it would learn. This is the first one's
    sum, with each token that an expert gets gathered once.
    """
    chosen, weights, _ = layer.gate(x)  # [B*L, k] both: the experts of each token, and how much each counts
    flat = x.reshape(-1, x.shape[-1])
    picks = chosen.flatten()
    order = picks.argsort(stable=True)
    rows = (order // chosen.shape[1]).split(_counts(picks, len(layer.experts)))
    answers = torch.cat([expert(flat[mine]) for expert, mine in zip(layer.experts, rows, strict=True)])
    by_token = answers[order.argsort()].view(*chosen.shape, -1)
    mixed = (by_token * weights.unsqueeze(-1)).sum(1).view_as(x)
    shared: Tensor = layer.shared_experts(x)
    return mixed + shared


def _counts(picks: Tensor, experts: int) -> list[int]:
    """How many of the picks fall on each expert; alike many where nothing is known of them."""
    if picks.is_meta:
        return [len(part) for part in torch.arange(len(picks)).tensor_split(experts)]
    counts: list[int] = picks.bincount(minlength=experts).tolist()
    return counts
