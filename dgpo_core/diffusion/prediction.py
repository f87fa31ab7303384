"""What a diffusion model predicts, as three small classes with one interface: Flow, Epsilon and V.

Conventions, everywhere in this package:
- `t` is the model's own timestep: a float tensor [B] in 0..`num_train_timesteps`, high means noisy;
- `x0` is a clean latent [B,C,h,w], `eps` is standard normal noise of that shape, `x_t = alpha(t) x0 + sigma(t) eps`;
- results have the dtype of `x0` (or of `x_t`) and are computed in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dgpo_core.common.errors import UserError

# The smallest cumulative alpha that is divided by: what diffusers' schedulers put in place of an exact zero.
_MIN_ALPHA_CUMPROD = 2.0**-24


@dataclass(frozen=True, eq=False)
class Prediction(ABC):
    """The noise schedule of a model and the quantity that its network returns."""

    name: ClassVar[str]
    num_train_timesteps: int = 1000

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`(alpha, sigma)` at timesteps t [B]: two float32 tensors [B], both in 0..1."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a perfect network returns for `x_t` at t [B]; shape of x0 [B,C,h,w]."""

    @abstractmethod
    def x0_from(self, x_t: Tensor, pred: Tensor, t: Tensor) -> Tensor:
        """The clean latent [B,C,h,w] that the network's answer `pred` at (x_t, t) stands for."""

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """`x_t = alpha(t) x0 + sigma(t) eps`, [B,C,h,w]."""
        alpha, sigma = self._spread(t, x0)
        return (alpha * x0 + sigma * eps).to(x0.dtype)

    def level(self, t: Tensor) -> Tensor:
        """`t / num_train_timesteps`, 0..1: what `t_min` is compared with; for a flow model this is sigma."""
        return t / self.num_train_timesteps

    def nearest(self, t: Tensor) -> Tensor:
        """The model's own timesteps nearest to t [B]: noise level and what the network is told are then the same."""
        return t

    def _spread(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients shaped [B,1,1,1], ready to multiply a tensor like `like`."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = self.coefficients(t)
        return alpha.view(shape), sigma.view(shape)


@dataclass(frozen=True, eq=False)
class Flow(Prediction):
    """Rectified flow (SD3, Flux): `x_t = (1-s) x0 + s eps`, the network returns the velocity `eps - x0`."""

    name: ClassVar[str] = "flow"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.float() / self.num_train_timesteps
        return 1 - sigma, sigma

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return (eps.float() - x0.float()).to(x0.dtype)

    def x0_from(self, x_t: Tensor, pred: Tensor, t: Tensor) -> Tensor:
        _, sigma = self._spread(t, x_t)
        return (x_t - sigma * pred).to(x_t.dtype)


@dataclass(frozen=True, eq=False)
class _Discrete(Prediction):
    """Variance-preserving diffusion on a table of `alphas_cumprod` [T]; t is rounded to an index of that table."""

    alphas_cumprod: Tensor = field(default_factory=lambda: torch.empty(0))

    def nearest(self, t: Tensor) -> Tensor:
        return t.round().clamp(0, self.num_train_timesteps - 1)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index = self.nearest(t).long()
        alpha_cumprod = self.alphas_cumprod.to(t.device)[index]
        return alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()


@dataclass(frozen=True, eq=False)
class Epsilon(_Discrete):
    """The network returns the noise: `eps`."""

    name: ClassVar[str] = "epsilon"

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps.to(x0.dtype)

    def x0_from(self, x_t: Tensor, pred: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._spread(t, x_t)
        return ((x_t - sigma * pred) / alpha.clamp_min(_MIN_ALPHA_CUMPROD**0.5)).to(x_t.dtype)


@dataclass(frozen=True, eq=False)
class V(_Discrete):
    """The network returns `v = alpha eps - sigma x0` (Salimans & Ho, arXiv 2202.00512, appendix D)."""

    name: ClassVar[str] = "v"

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._spread(t, x0)
        return (alpha * eps - sigma * x0).to(x0.dtype)

    def x0_from(self, x_t: Tensor, pred: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._spread(t, x_t)
        return (alpha * x_t - sigma * pred).to(x_t.dtype)


def prediction_from_config(config: Mapping[str, Any], device: torch.device | str = "cpu") -> Prediction:
    """What a diffusers scheduler config says: Epsilon or V on its betas, with their zero-terminal-SNR rescaling; Flow.

    Raises UserError for any other `prediction_type`.
    """
    from diffusers import DDIMScheduler  # imported late: flow models and the pure tests do not need it

    kinds: dict[str, type[_Discrete]] = {"epsilon": Epsilon, "v_prediction": V}
    if "shift" in config and "prediction_type" not in config:  # of diffusers' FlowMatch schedulers
        return Flow(num_train_timesteps=config.get("num_train_timesteps", 1000))
    kind = config.get("prediction_type", "epsilon")
    if kind not in kinds:
        raise UserError(f"The model's scheduler predicts {kind!r}, which is not supported: use one of {sorted(kinds)}.")
    table = DDIMScheduler.from_config(dict(config)).alphas_cumprod
    return kinds[kind](num_train_timesteps=len(table), alphas_cumprod=table.float().to(device))
