"""A group: one prompt, G samples drawn for it, and what was thought of them. Immutable."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from dgpo_core.common.prompts import Prompt


@dataclass(frozen=True, eq=False)
class Group:
    """G samples of one prompt.

    seeds: G seeds, each of one sample's initial noise.
    latents: clean latents x0, float32 [G, C, h, w] (of a video model [G, C, 1, h, w]), on the policy's device.
    images: float32 [G, 3, H, W] in [0, 1], on the CPU.
    scores: raw rewards by reward name, float32 [G] each.
    """

    prompt: Prompt
    seeds: tuple[int, ...]
    latents: Tensor
    images: Tensor
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """The pictures that its prompt brought, float32 [3, h, w] in [0, 1] each, of any sizes; most have none."""
        return tuple(source.image() for source in self.prompt.sources)

    def scored(self, scores: Mapping[str, Tensor]) -> "Group":
        """The same group with its rewards."""
        return replace(self, scores=dict(scores))
