"""The latents of source pictures, which editors see besides the noisy ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.reading import shown
from dgpo_core.common.source import Source
from dgpo_core.policy.base import Cond
from dgpo_core.policy.pipeline import DiffusersPolicy

MOST_BYTES = 2**28
"""Of latents that are kept; those of 1024 x 1024 pixels are 1 MiB in float32."""


class SourceLatents:
    """Encodes sources with a policy's VAE and keeps the latest, on the CPU."""

    def __init__(self, policy: DiffusersPolicy) -> None:
        self._policy = policy
        self._kept: OrderedDict[tuple[str, tuple[int, int]], Tensor] = OrderedDict()

    def of(self, source: Source, size: tuple[int, int]) -> Tensor:
        """[1,C,h,w] of the picture at `size` pixels, on the policy's device and in its dtype.

        Raises UserError where it has other proportions or its file cannot be read.
        """
        key, policy = (source.key, size), self._policy
        if key not in self._kept:
            self._kept[key] = policy.encode_images(source.fitted(size)[None].to(policy.device)).cpu()
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(latents.nbytes for latents in self._kept.values()) > MOST_BYTES:
            self._kept.popitem(last=False)
        return self._kept[key].to(policy.device, policy.dtype)

    def together(self, prompts: Sequence[Prompt], size: tuple[int, int]) -> list[Tensor]:
        """[1,n,C,h,w] of each prompt's n pictures."""
        return [torch.stack([self.of(source, size) for source in prompt.sources], 1) for prompt in prompts]


def require_as_many(prompts: Sequence[Prompt], family: str) -> None:
    """Raises UserError for a prompt that brings another number of pictures than the first one."""
    other = next((prompt for prompt in prompts if len(prompt.sources) != len(prompts[0].sources)), None)
    if other is not None:
        raise UserError(
            f"{shown(other.where, 1000) or 'A prompt'}: the prompt {shown(other.text, 60)!r} brings"
            f" {len(other.sources)} of the pictures to edit, and the first one {len(prompts[0].sources)}: a model of"
            f" the family {family} is trained on prompts that all bring as many."
        )


def beside(conds: Sequence[Cond], unconds: Sequence[Cond], sources: Sequence[Tensor]) -> tuple[list[Cond], Cond]:
    """The conditionings of prompts, one or more, and the negative ones, each with the prompt's sources."""

    def seen(ones: Sequence[Cond]) -> list[Cond]:
        return [Cond({**one.tensors, "source": z}) for one, z in zip(ones, sources, strict=True)]

    return seen(conds), Cond.cat(seen(unconds))
