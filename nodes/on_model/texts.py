"""How a native policy comes from a text to a CONDITIONING of ComfyUI's, by a CLIP or as given, and trains on it."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.hooks
import comfy.model_base
import comfy.utils
import node_helpers
import torch
from torch import Tensor

from dgpo_core.common.errors import UserError

from ..common.fingerprint import fingerprint, nothing, whole
from ..common.values import Conditionings

Conditioning = list[list[Any]]
"""Pairs of tokens [1, n, width] and a dictionary of all else that the network is told."""


_TIMED = ("start_percent", "end_percent", "clip_start_percent", "control", "hooks")  # differ by the noise level


@dataclass(frozen=True)
class Texts:
    """source: what ComfyUI keeps in memory; read(source, text, pictures): the conditioning; fingerprint: of all."""

    source: Any
    read: Callable[..., Conditioning]
    fingerprint: str

    def encode(self, text: str, pictures: Sequence[Tensor] = ()) -> Conditioning:
        """From the source as it is. pictures: [3,H,W] in [0, 1] each, what the text is about."""
        return self.read(self.source, text, pictures)


def by_clip(clip: Any) -> Texts:
    """Every text, as CLIP Text Encode has it. Raises UserError where it puts hooks with weights on them."""
    _refuse_hooks(getattr(clip, "apply_hooks_to_conds", None))
    return Texts(clip, encoded, fingerprint(clip.patcher, clip.layer_idx, getattr(clip, "tokenizer_options", {})))


def as_given(conditionings: Conditionings, negative: Conditioning, model: Any) -> Texts:
    """The prompts of the chain; the empty text is the negative one. model: the MODEL that they are for.

    Raises UserError for a prompt that has hooks with weights.
    """
    for _, conditioning in conditionings.prompts:
        for _, more in conditioning:
            others = more["control"].get_extra_hooks() if "control" in more else ()
            _refuse_hooks(more.get("hooks"), *others)
    looked_at: Sequence[Any] = (conditionings.prompts, negative)
    if type(model.model).encode_adm is comfy.model_base.BaseModel.encode_adm:
        # it takes no pooled output, and that of SD1.5's text encoder is made of a weight that no file has
        looked_at = [
            tuple((text, _without_pooled(one)) for text, one in conditionings.prompts),
            _without_pooled(negative),
        ]
    found = fingerprint(*looked_at, read=whole)
    return Texts(conditionings, functools.partial(_look_up, negative), found)


def _refuse_hooks(*groups: Any) -> None:
    """ComfyUI takes their weights off the network after each forward, so that a backward would go through others."""
    if any(group is not None and group.get_type(comfy.hooks.EnumHookType.Weight) for group in groups):
        raise UserError(
            "The CONDITIONING has a hook with weights (such as Create Hook LoRA), which cannot be trained through: put"
            " that LoRA on the MODEL with a LoRA loader."
        )


def _without_pooled(conditioning: Conditioning) -> Conditioning:
    pooled = "pooled_output"
    return [
        [tokens, {key: nothing(value) if key == pooled and value is not None else value for key, value in more.items()}]
        for tokens, more in conditioning
    ]


def encoded(clip: Any, text: str, pictures: Sequence[Tensor] = ()) -> Conditioning:
    """As CLIP Text Encode has it. pictures: [3,H,W] in [0, 1] each, which a text encoder that sees is shown."""
    tokenize = getattr(getattr(clip, "tokenizer", None), "tokenize_with_weights", clip.tokenize)
    if pictures and "images" in inspect.signature(tokenize).parameters:  # one that sees, such as Qwen-Image's
        return clip.encode_from_tokens_scheduled(clip.tokenize(text, images=[_for_eyes(one) for one in pictures]))
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def referring(conditioning: Conditioning, vae: Any, pictures: Sequence[Tensor]) -> Conditioning:
    """With the pictures, [3,H,W] in [0, 1] each, as reference latents."""
    latents = [vae.encode(picture.movedim(0, -1)[None]) for picture in pictures]
    if not latents:
        return conditioning
    return node_helpers.conditioning_set_values(conditioning, {"reference_latents": latents}, append=True)


def _for_eyes(picture: Tensor) -> Tensor:
    """As a text encoder that sees takes it, [1,H,W,3] of about a megapixel: ComfyUI's TextEncodeQwenImageEdit."""
    height, width = picture.shape[-2:]
    scale = math.sqrt(1024 * 1024 / (height * width))
    size = round(width * scale), round(height * scale)
    return comfy.utils.common_upscale(picture[None], *size, "area", "disabled").movedim(1, -1)


def _look_up(
    negative: Conditioning, conditionings: Conditionings, text: str, pictures: Sequence[Tensor] = ()
) -> Conditioning:
    """Raises UserError for a text that was not given."""
    known = {"": negative, **dict(conditionings.prompts)}
    if text not in known:
        raise UserError(
            f"This policy has no CONDITIONING for the text {text!r}: add a Conditioned Prompt with it, or, where it is"
            " the negative_prompt of Sampler Settings, leave that empty: the policy has its negative connected."
        )
    return known[text]


# --- for training ----------------------------------------------------------------------------------------------------


def own(value: Any) -> Any:
    """The conditioning with every tensor in normal memory on the CPU."""
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: own(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(own(part) for part in value)
    return value


def size(value: Any) -> int:
    """Bytes of all tensors in a conditioning."""
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(size, parts))


def references(conditionings: Iterable[Conditioning]) -> int:
    """The most values per channel of the reference latents of one of them."""
    latents = [[part for _, more in one for part in more.get("reference_latents") or ()] for one in conditionings]
    return max((sum(part[0, 0].numel() for part in parts) for parts in latents), default=0)


def together(
    texts: Tensor, sigma: Tensor, known: Mapping[int, Conditioning], by_level: bool
) -> list[tuple[Tensor, Conditioning]]:
    """The rows of a batch, [B] numbers of texts and noise levels, that may go through the network at once.

    Those of one text; of one noise level, too, where the text's conditioning depends on it, or, with `by_level`, the
    MODEL does: ComfyUI looks at the first row alone, since all rows of a sampler have the same.
    """
    found = []
    for text, conditioning in known.items():
        rows = (texts == text).nonzero().flatten()
        timed = by_level or any(key in more for _, more in conditioning for key in _TIMED)
        levels = sigma[rows] if timed else torch.zeros_like(rows)
        found += [(rows[levels == level], conditioning) for level in levels.unique()]
    return found


def without_gradient(conds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conditions of one forward, whose ControlNets autograd does not see: their weights are inference tensors."""
    return [cond | {"control": _Frozen(cond["control"])} if "control" in cond else cond for cond in conds]


class _Frozen:
    """A ControlNet without gradients: it looks at the noisy latent alone, which needs none."""

    def __init__(self, control: Any) -> None:
        self._control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)

    def get_control(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self._control.get_control(*args, **kwargs)
