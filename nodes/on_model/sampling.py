"""A MODEL's noise schedule in the engine's terms, the way between their noisy latents, and ComfyUI's own samplers.

The engine's x_t is alpha x0 + sigma eps with alpha, sigma in 0..1. ComfyUI's flow models have the same; its epsilon and
v models have x0 + s eps with s = sigma / alpha, which the model scales down again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.model_sampling as sampling
import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.diffusion.prediction import Epsilon, Flow, Prediction, V
from dgpo_core.diffusion.solvers import SOLVERS, Solver, choose, find, make_solver
from dgpo_core.policy import distilled
from dgpo_core.policy.base import Check
from dgpo_core.policy.distilled import FewSteps

from .attention import OVERRIDE

_DETERMINISTIC = (
    *("euler", "heun", "ddim", "dpmpp_2m", "uni_pc", "uni_pc_bh2", "lms", "deis", "ipndm", "ipndm_v"),
    *("dpm_2", "dpm_fast", "heunpp2", "exp_heun_2_x0", "res_multistep", "gradient_estimation"),
    *("euler_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp", "gradient_estimation_cfg_pp"),
)  # but dpm_adaptive: how far it goes at a time depends on all images that it draws at once
SAMPLERS = tuple(name for name in _DETERMINISTIC if name in comfy.samplers.SAMPLER_NAMES)
"""ComfyUI's samplers that add no noise on the way, those that this ComfyUI has."""

_DISCRETE = ("epsilon", sampling.EPS), ("v", sampling.V_PREDICTION)
_ARITHMETIC = ("calculate_input", "calculate_denoised", "noise_scaling")  # of what a network returns
_TIMES = ("timestep", "sigma")  # of a noise schedule
_OF_UNETS = ("EPS", "V_PREDICTION", "EDM", "V_PREDICTION_EDM")  # model types whose network may predict either
_FLOW_STEPS = 1000  # the engine's timesteps of a flow model; the model's own scale is its `model_sampling`'s affair


def few_steps(patcher: Any) -> FewSteps | None:
    """Whether a MODEL draws in few steps: by its file's name, where ComfyUI keeps that, and its kind.

    Sampling settings for LCM say so, too, but are refused (see `schedule`).
    """
    reload = getattr(patcher, "cached_patcher_init", None)  # (function, its arguments, ...), for loading it again
    arguments = reload[1] if isinstance(reload, tuple) and len(reload) > 1 else ()
    paths = [argument for argument in arguments if isinstance(argument, str)] if isinstance(arguments, tuple) else []
    found = distilled.find([name for path in paths[:1] for name in distilled.names_of(path)])
    kind = type(patcher.model.model_config).__name__
    if found is None and kind == "FluxSchnell":
        return FewSteps("FLUX schnell", 4, "its weights")
    return found


def schedule(model_sampling: Any, device: torch.device) -> tuple[Prediction, dict[str, Any]]:
    """What a MODEL with this `model_sampling` predicts, and a scheduler config for the engine's solvers.

    It counts what the object computes, not what it is derived from: LCM, for one, is a child of epsilon's class. Raises
    UserError, by name, for a kind other than epsilon, v and flow, or one of these on other noise.
    """
    kind = _kind(model_sampling)
    if kind == "flow":
        if getattr(model_sampling, "noise_scale", 1.0) != 1.0:
            raise UserError("The MODEL scales its noise (noise_scale), which cannot be trained: use another model.")
        shift = float(model_sampling.shift)
        factor = math.exp(shift) if isinstance(model_sampling, sampling.ModelSamplingFlux) else shift
        return Flow(_FLOW_STEPS), {"shift": factor, "num_train_timesteps": _FLOW_STEPS}
    if kind == "epsilon" and getattr(model_sampling, "zsnr", False):
        raise UserError(
            "The MODEL predicts epsilon with zero terminal SNR, which is impossible (there noise says nothing of the"
            " picture): switch zsnr off in its ModelSampling node, or choose v_prediction."
        )
    if kind:
        return _discrete(model_sampling, device)
    raise UserError(
        f"The MODEL's noise schedule is none that can be trained ({_name(model_sampling)}): use an epsilon, v or flow"
        " model, or take its ModelSampling node away."
    )


def _kind(model_sampling: Any) -> str:
    """epsilon, v, flow, or empty for another."""
    cls = type(model_sampling)

    def computes(parent: type, names: Sequence[str]) -> bool:
        return issubclass(cls, parent) and all(getattr(cls, name) is getattr(parent, name) for name in names)

    if any(computes(flow, _TIMES) for flow in (sampling.ModelSamplingDiscreteFlow, sampling.ModelSamplingFlux)):
        return "flow" if computes(sampling.CONST, _ARITHMETIC) else ""
    if not computes(sampling.ModelSamplingDiscrete, _TIMES):
        return ""
    return next((kind for kind, parent in _DISCRETE if computes(parent, _ARITHMETIC)), "")


def _name(model_sampling: Any) -> str:
    """What a kind is called: its parts, where ComfyUI has put it together of a schedule and what is predicted."""
    parts = [cls.__name__ for cls in type(model_sampling).__bases__ if cls is not torch.nn.Module]
    return " with ".join(reversed(parts)) or type(model_sampling).__name__


def decided(patcher: Any, prediction: str) -> Any:
    """The MODEL with the sampling of what the user says it predicts, as ComfyUI's ModelSampling nodes put it there.

    patcher: a clone, which may be changed; prediction: as `model.prediction`. Where the MODEL has it so already, or for
    "auto", it stays as it is. Raises UserError for a network that can predict nothing else than it does.
    """
    own = patcher.get_model_object("model_sampling")
    if prediction in ("auto", _kind(own)):
        return patcher
    if patcher.model.model_type.name not in _OF_UNETS:
        raise UserError(f"This MODEL cannot predict {prediction}: set prediction to auto.")
    if prediction == "flow":
        parents: tuple[type, ...] = sampling.ModelSamplingDiscreteFlow, sampling.CONST
        options = {}
    else:
        parents = sampling.ModelSamplingDiscrete, dict(_DISCRETE)[prediction]
        options = {"zsnr": False if prediction == "epsilon" else getattr(own, "zsnr", None) or None}
    made = type("ModelSamplingDecided", parents, {})(patcher.model.model_config, **options)
    patcher.add_object_patch("model_sampling", made)
    return patcher


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


# --- patches of other nodes -------------------------------------------------------------------------------------------


def is_patched(patcher: Any) -> bool:
    """Whether nodes have put functions into a MODEL's forward. These may look at the noise level, as Kohya's Deep
    Shrink does, and take the first row's for all rows'."""
    of_network = patcher.model_options["transformer_options"]
    kinds = [of_network.get(name) for name in ("patches", "patches_replace", "wrappers", OVERRIDE)]
    return any(map(_holds, (*kinds, patcher.wrappers, patcher.model_options.get("model_function_wrapper"))))


def _holds(value: Any) -> bool:
    """Whether there is anything in it, also in dictionaries of dictionaries."""
    return any(map(_holds, value.values())) if isinstance(value, dict) else bool(value)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Inside, torch draws the same random numbers each time, and outside as if nothing had been: patches such as token
    merging draw some, and what they make of a latent must not depend on what was drawn before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


# --- drawing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NativeSolver(Solver):
    """One of ComfyUI's samplers, by `name`, on ComfyUI's noise levels `sigmas` [n + 1], descending to the last, 0."""

    sigmas: Tensor


def make_native_solver(
    patcher: Any,
    prediction: Prediction,
    config: Mapping[str, Any],
    name: str,
    steps: int,
    shift: float | None = None,
    scheduler: str = "",
) -> NativeSolver:
    """The sampler `name` on KSampler's levels for a scheduler, or (without one) on the engine's for `config`.

    Raises UserError for a name that there is not, a sampler that adds noise, and a bad number of steps.
    """
    name = choose(name, SAMPLERS, "native policies")
    if scheduler:
        return NativeSolver(name, *_scheduled(patcher, prediction, name, check_scheduler(scheduler), steps))
    of_engine = find(name, SOLVERS[prediction.name]) or "euler"
    timesteps = make_solver(of_engine, config, prediction, steps, shift=shift).timesteps
    return NativeSolver(name, timesteps, torch.cat([_levels(prediction, timesteps), torch.zeros(1)]))


def check_scheduler(name: str) -> str:
    """The name, if it is one of ComfyUI's schedulers; else UserError."""
    known = comfy.samplers.KSampler.SCHEDULERS
    if name not in known:
        raise UserError(f"ComfyUI has no scheduler {name!r}: use one of {', '.join(known)}.")
    return name


def _scheduled(patcher: Any, prediction: Prediction, name: str, scheduler: str, steps: int) -> tuple[Tensor, Tensor]:
    """KSampler's sigmas, and the engine's timesteps that are nearest to them, in the order of a `NativeSolver`."""
    ksampler = comfy.samplers.KSampler(patcher, steps, torch.device("cpu"), name, scheduler, 1.0)
    sigmas = ksampler.sigmas.float()
    noisy = sigmas[sigmas > 0]
    if isinstance(prediction, Flow):
        timesteps = noisy * prediction.num_train_timesteps
    else:
        timesteps = patcher.get_model_object("model_sampling").timestep(noisy).float()
    return timesteps.unique(sorted=True).flip(0).cpu(), sigmas


def _levels(prediction: Prediction, t: Tensor) -> Tensor:
    """ComfyUI's sigmas of the engine's timesteps, both [n]."""
    return to_comfy(prediction, torch.zeros(len(t)), t)[1].cpu()


class _Keeping(comfy.samplers.KSAMPLER):
    """A sampler that keeps what it drew as the model has it: what comes out in the end is scaled for the VAE."""

    def __init__(self, sampler: comfy.samplers.KSAMPLER) -> None:
        super().__init__(sampler.sampler_function, sampler.extra_options, sampler.inpaint_options)
        self.x0 = torch.empty(0)

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        self.x0 = super().sample(*args, **kwargs)
        return self.x0


def draw(
    patcher: Any, solver: NativeSolver, x_T: Tensor, positive: Any, negative: Any, cfg: float, check: Check
) -> Tensor:
    """What KSampler makes of the noise x_T [B,C,h,w]: clean latents of that shape as the model has them, float32.

    positive and negative: CONDITIONING. check: called before every forward of the network.
    """
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    guider.model_options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
    add_wrapper(WrappersMP.APPLY_MODEL, _checked(check), guider.model_options, is_model_options=True)
    sampler = _Keeping(comfy.samplers.sampler_object(solver.name))
    with torch.inference_mode(), repeatable(patcher.load_device):
        empty = comfy.sample.fix_empty_latent_channels(patcher, torch.zeros_like(x_T))
        sigmas = solver.sigmas.clone()  # uni_pc writes into them
        guider.sample(x_T.view(empty.shape), empty, sampler, sigmas, disable_pbar=True, seed=0)
    return sampler.x0.to(torch.float32, copy=True).view(x_T.shape)


def _checked(check: Check) -> Callable[..., Any]:
    def forward(network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        check()
        return network(*args, **kwargs)

    return forward


def _spread(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
