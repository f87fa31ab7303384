"""What the families with a transformer and a flow share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from dgpo_core.diffusion.prediction import Flow, Prediction
from dgpo_core.policy.pipeline import DiffusersPolicy


class FlowPolicy(DiffusersPolicy):
    """A transformer with a stream for the image and one for the text, which returns a flow's velocity."""

    network_name = "transformer"
    targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )
    patch = 2

    def _prediction(self) -> Prediction:
        return Flow(num_train_timesteps=self.scheduler_config.get("num_train_timesteps", 1000))

    def _solver_options(self, steps: int, latent: tuple[int, int, int]) -> dict[str, Any]:
        """What Flux's pipeline and later ones ask of the scheduler: unshifted levels from 1 to 1 / steps, and mu."""
        sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
        return {"mu": dynamic_mu(self.scheduler_config, latent, self.patch, max_shift=1.15), "sigmas": sigmas}


def dynamic_mu(config: Mapping[str, Any], latent: tuple[int, int, int], patch: int, max_shift: float = 1.16) -> float:
    """The exponent of the dynamic shift for a latent (C, h, w): a line in the number of image tokens.

    Source: `calculate_shift` of diffusers' SD3 and Flux pipelines (whose defaults of max_shift differ).
    """
    tokens = (latent[1] // patch) * (latent[2] // patch)
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (top - base) / (high - low)
    return tokens * slope + (base - slope * low)
