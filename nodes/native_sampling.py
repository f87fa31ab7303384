"""A MODEL's noise schedule in the engine's terms, and the way between their noisy latents.

The engine's x_t is alpha x0 + sigma eps with alpha, sigma in 0..1. ComfyUI's flow models have the same; its epsilon and
v models have x0 + s eps with s = sigma / alpha, which the model scales down again.
"""

from __future__ import annotations

import math
from typing import Any

import comfy.model_sampling as sampling
import torch
from torch import Tensor

from dgpo_core.errors import UserError
from dgpo_core.prediction import Epsilon, Flow, Prediction, V

_UNKNOWN = (
    sampling.EDM,
    sampling.X0,
    sampling.ModelSamplingDiscreteEDM,
    sampling.ModelSamplingContinuousEDM,
    sampling.StableCascadeSampling,
)
_FLOW_STEPS = 1000  # the engine's timesteps of a flow model; the model's own scale is its `model_sampling`'s affair


def schedule(model_sampling: Any, device: torch.device) -> tuple[Prediction, dict[str, Any]]:
    """What a MODEL with this `model_sampling` predicts, and a scheduler config for the engine's solvers.

    Raises UserError for a kind other than epsilon, v and flow.
    """
    known = isinstance(model_sampling, sampling.CONST | sampling.EPS) and not isinstance(model_sampling, _UNKNOWN)
    if known and isinstance(model_sampling, sampling.ModelSamplingDiscreteFlow | sampling.ModelSamplingFlux):
        shift = float(model_sampling.shift)
        factor = math.exp(shift) if isinstance(model_sampling, sampling.ModelSamplingFlux) else shift
        return Flow(_FLOW_STEPS), {"shift": factor, "num_train_timesteps": _FLOW_STEPS}
    if known and isinstance(model_sampling, sampling.ModelSamplingDiscrete):
        return _discrete(model_sampling, device)
    raise UserError("The MODEL's noise schedule is none that can be trained: use an epsilon, v or flow model.")


def _discrete(model_sampling: Any, device: torch.device) -> tuple[Prediction, dict[str, Any]]:
    sigmas = model_sampling.sigmas.to("cpu", torch.float64, copy=True)
    alphas = 1 / (sigmas**2 + 1)
    betas = 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
    cls, kind = (V, "v_prediction") if isinstance(model_sampling, sampling.V_PREDICTION) else (Epsilon, "epsilon")
    config = {
        "num_train_timesteps": len(sigmas),
        "trained_betas": betas.tolist(),
        "prediction_type": kind,
        "timestep_spacing": "linspace",  # from the noisiest level to the cleanest, as ComfyUI's "normal" schedule
    }
    return cls(num_train_timesteps=len(sigmas), alphas_cumprod=alphas.float().to(device)), config


def to_comfy(prediction: Prediction, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """ComfyUI's noisy latent [B,C,h,w] and sigma [B] for the engine's x_t [B,C,h,w] and t [B]."""
    alpha, sigma = prediction.coefficients(t)
    if isinstance(prediction, Flow):
        return x_t, sigma
    return x_t / _spread(alpha, x_t), sigma / alpha


def from_denoised(prediction: Prediction, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """What the network returned [B,C,h,w], given the clean latent x0 that ComfyUI made of it."""
    alpha, sigma = (_spread(value, x_t) for value in prediction.coefficients(t))
    return prediction.target(x0, (x_t - alpha * x0) / sigma, t)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
