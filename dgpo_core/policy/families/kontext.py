"""FLUX.1 Kontext: Flux that edits. The source picture's latents are further tokens behind those of the noisy ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dgpo_core.common.prompts import Prompt
from dgpo_core.policy.base import Cond
from dgpo_core.policy.families.flux import Flux
from dgpo_core.policy.families.patches import unpack
from dgpo_core.policy.families.sources import SourceLatents, beside


class Kontext(Flux):
    """FLUX.1 Kontext dev. `guidance` is embedded where the network has a place for it.

    A prompt brings one picture, of the proportions of what is drawn, which is scaled to its size. (diffusers' own
    pipeline scales it to one of the sizes that the model was trained on; with `_auto_resize=False` it takes it as it
    is.) A single file of it has the tensors of a Flux: it is known by its name, its header, or the family that is asked
    for.
    """

    family = "kontext"
    pipeline_classes = ("FluxKontextPipeline", "FluxKontextInpaintPipeline")
    architecture = "flux-1-dev-kontext"
    marks = ()
    looks_like = "flux"
    sources = (1, 1)

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        self._source_latents = SourceLatents(self)

    @property
    def default_size(self) -> tuple[int, int]:
        side: int = self.pipe.vae.config.sample_size
        return side, side

    def condition(self, prompts: Sequence[Prompt], negative: str, size: tuple[int, int]) -> tuple[list[Cond], Cond]:
        conds, uncond = super().condition(prompts, negative, size)
        if not prompts:
            return conds, uncond
        latents = [self._source_latents.of(prompt.sources[0], size) for prompt in prompts]
        return beside(conds, [uncond] * len(prompts), latents)

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return unpack(self._velocity(x, t, cond, cond["source"]), *x.shape[-2:])
