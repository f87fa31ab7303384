"""Deterministic ODE solvers, by name, through diffusers' schedulers.

A solver draws what the family's diffusers pipeline draws with the same scheduler, and nothing random but its start:
same noise, same image, bit for bit. Solvers that add noise on the way are refused by name.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.diffusion.prediction import Prediction

Predict = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, int], None]
Reset = Callable[[], None]


@dataclass(frozen=True)
class Schedule:
    """Everything that decides a solver's noise levels.

    config: the checkpoint's scheduler config; steps >= 1; shift: replaces the config's shift and switches dynamic
    shifting off; mu: exponent of the dynamic shift (used where the config asks for it); sigmas: explicit unshifted
    levels, descending in 1..0, for families whose pipeline passes them (Flux).
    """

    config: Mapping[str, Any]
    steps: int
    shift: float | None = None
    mu: float | None = None
    sigmas: Sequence[float] | None = None

    @property
    def dynamic(self) -> bool:
        """Whether the shift depends on the image size through mu."""
        return self.shift is None and bool(self.config.get("use_dynamic_shifting", False))

    @property
    def fixed_shift(self) -> float:
        """The shift as a plain factor; for a dynamic one, the factor that gives the same curve."""
        if not self.dynamic:
            return float(self.config.get("shift", 1.0) if self.shift is None else self.shift)
        assert self.mu is not None  # make_solver has looked
        return self.mu if self.config.get("time_shift_type", "exponential") == "linear" else math.exp(self.mu)


Builder = Callable[[Schedule], tuple[Any, Reset]]
"""A solver's noise levels and steps: a scheduler of diffusers', or what has its `step`, `timesteps` and, where they are
needed, `scale_model_input` and `init_noise_sigma`; and a function that makes it ready to draw once."""


@dataclass(frozen=True)
class Solver:
    """What all policies' solvers have; see `Policy.solver` and `Policy.sample`.

    timesteps: the distinct model timesteps, float32 [n], descending: what training may draw from.
    """

    name: str
    timesteps: Tensor


@dataclass(frozen=True)
class SchedulerSolver(Solver):
    """A scheduler of diffusers' that is ready to draw; make it with `make_solver`.

    name: as in SOLVERS. calls: model calls per sample (Heun and PLMS need more of them than steps).
    """

    calls: int
    _scheduler: Any
    _reset: Reset

    def forget(self) -> None:
        """Lets go of the last sample: diffusers' schedulers keep a history of model outputs."""
        self._reset()

    @torch.no_grad()
    def sample(self, predict: Predict, noise: Tensor, on_step: OnStep | None = None) -> Tensor:
        """Integrates from `noise` [B,C,h,w], standard normal, to a clean latent of the same shape, float32.

        predict(x, t): called with the model's true input [B,C,h,w] (scaled where the scheduler scales) and the model's
        timestep, float32 [B]; returns the network's answer in float32. on_step(done, calls) follows every call.
        """
        self.forget()
        scheduler = self._scheduler
        scale_input = getattr(scheduler, "scale_model_input", None)
        x = noise.float() * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for done, t in enumerate(scheduler.timesteps, start=1):
            t_batch = torch.full((x.shape[0],), float(t), dtype=torch.float32, device=x.device)
            model_input = x if scale_input is None else scale_input(x, t)
            x = scheduler.step(predict(model_input, t_batch), t, x, return_dict=False)[0]
            if on_step is not None:
                on_step(done, self.calls)
        return x


def _scheduler(name: str) -> Any:
    """A scheduler class of diffusers, which is imported late: it takes seconds, and names can be checked without it."""
    import diffusers

    return getattr(diffusers, name)


# --- flow models -----------------------------------------------------------------------------------------------------


def _flow_euler(s: Schedule) -> tuple[Any, Reset]:
    config = {**s.config, "shift": s.fixed_shift if not s.dynamic else s.config.get("shift", 1.0)}
    config.update(use_dynamic_shifting=s.dynamic, stochastic_sampling=False)
    scheduler = _scheduler("FlowMatchEulerDiscreteScheduler").from_config(config)
    sigmas = None if s.sigmas is None else list(s.sigmas)
    return scheduler, lambda: scheduler.set_timesteps(s.steps, sigmas=sigmas, mu=s.mu if s.dynamic else None)


def _flow_heun(s: Schedule) -> tuple[Any, Reset]:
    """Heun on Euler's levels: diffusers' own Heun scheduler knows neither dynamic shifting nor explicit sigmas."""
    euler, reset_euler = _flow_euler(s)
    reset_euler()
    sigmas, timesteps = euler.sigmas, euler.timesteps
    heun = _scheduler("FlowMatchHeunDiscreteScheduler")(num_train_timesteps=euler.config.num_train_timesteps)

    def reset() -> None:
        heun.set_timesteps(s.steps)
        # every level but the first is visited twice: as a prediction's end and as the next step's start
        heun.timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
        heun.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])

    return heun, reset


def _flow_multistep(cls: str, s: Schedule) -> tuple[Any, Reset]:
    scheduler = _scheduler(cls)(
        num_train_timesteps=s.config.get("num_train_timesteps", 1000),
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=s.fixed_shift,
    )
    return scheduler, lambda: scheduler.set_timesteps(s.steps)


def _flow_dpmpp_2m(s: Schedule) -> tuple[Any, Reset]:
    return _flow_multistep("DPMSolverMultistepScheduler", s)


def _flow_unipc(s: Schedule) -> tuple[Any, Reset]:
    return _flow_multistep("UniPCMultistepScheduler", s)


# --- epsilon and v models --------------------------------------------------------------------------------------------


def _discrete(cls: str, s: Schedule, **forced: Any) -> tuple[Any, Reset]:
    """A scheduler of class `cls` on the checkpoint's betas, without the clipping to -1..1 that is meant for pixels."""
    scheduler = _scheduler(cls).from_config({**s.config, "clip_sample": False, "thresholding": False, **forced})
    return scheduler, lambda: scheduler.set_timesteps(s.steps)


def _ddim(s: Schedule) -> tuple[Any, Reset]:
    return _discrete("DDIMScheduler", s)  # `step` has eta 0 by default


def _plms(s: Schedule) -> tuple[Any, Reset]:
    if s.config.get("rescale_betas_zero_snr", False):
        raise UserError("Solver 'plms' cannot start from zero terminal SNR, which this model uses: take 'ddim'.")
    return _discrete("PNDMScheduler", s, skip_prk_steps=True)


def _euler(s: Schedule) -> tuple[Any, Reset]:
    return _discrete("EulerDiscreteScheduler", s)


def _dpmpp_2m(s: Schedule) -> tuple[Any, Reset]:
    forced = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
    return _discrete("DPMSolverMultistepScheduler", s, **forced)


def _unipc(s: Schedule) -> tuple[Any, Reset]:
    return _discrete("UniPCMultistepScheduler", s, solver_order=2, solver_type="bh2", predict_x0=True)


_FLOW: dict[str, Builder] = {
    "euler": _flow_euler,
    "heun": _flow_heun,
    "dpmpp_2m": _flow_dpmpp_2m,
    "unipc": _flow_unipc,
}
_DISCRETE: dict[str, Builder] = {
    "ddim": _ddim,
    "plms": _plms,
    "euler": _euler,
    "dpmpp_2m": _dpmpp_2m,
    "unipc": _unipc,
}
SOLVERS: dict[str, dict[str, Builder]] = {"flow": _FLOW, "epsilon": _DISCRETE, "v": _DISCRETE}
"""By the prediction's name, the solvers by theirs. A new one is one function above and one line in its table."""

_ALIASES = {  # another spelling, where a name is not known as it is
    "uni_pc": "unipc",
    "unipc": "uni_pc",
    "pndm": "plms",
    "flow_euler": "euler",
    "dpm++_2m": "dpmpp_2m",
    "dpmsolver": "dpmpp_2m",
}
_NOISY = {  # solvers that add noise -> deterministic ones to use instead, the nearest first
    "euler_ancestral": ("euler",),
    "euler_a": ("euler",),
    "euler_ancestral_cfg_pp": ("euler_cfg_pp", "euler"),
    "dpm_2_ancestral": ("dpm_2", "dpmpp_2m"),
    "dpmpp_2s_ancestral": ("dpmpp_2m",),
    "dpmpp_2s_ancestral_cfg_pp": ("dpmpp_2m_cfg_pp", "dpmpp_2m"),
    "dpmpp_sde": ("dpmpp_2m",),
    "dpmpp_2m_sde": ("dpmpp_2m",),
    "dpmpp_2m_sde_heun": ("dpmpp_2m",),
    "dpmpp_3m_sde": ("dpmpp_2m",),
    "sde_dpmsolver++": ("dpmpp_2m",),
    "res_multistep_ancestral": ("res_multistep", "dpmpp_2m"),
    "res_multistep_ancestral_cfg_pp": ("res_multistep_cfg_pp", "dpmpp_2m"),
    "exp_heun_2_x0_sde": ("exp_heun_2_x0", "heun"),
    "seeds_2": ("exp_heun_2_x0", "heun", "dpmpp_2m"),
    "seeds_3": ("exp_heun_2_x0", "heun", "dpmpp_2m"),
    "ddpm": ("ddim",),
    "lcm": ("ddim",),
    "tcd": ("ddim",),
    "er_sde": ("dpmpp_2m",),
    "sa_solver": ("uni_pc", "unipc"),
    "sa_solver_pece": ("uni_pc", "unipc"),
    "flow_sde": ("euler",),
}


def check_solver(name: str, prediction: str) -> str:
    """The canonical name of a solver for a prediction ("flow", "epsilon", "v"); UserError where there is none."""
    return choose(name, tuple(SOLVERS[prediction]), f"{prediction} models")


def choose(name: str, known: Sequence[str], what_for: str) -> str:
    """The one of `known` that a solver's name stands for.

    Raises UserError where there is none: for a solver that adds noise with the one of `known` to use instead.
    """
    one, plain = find(name, known), _plain(name)
    if one:
        return one
    siblings = _siblings(plain.removesuffix("_gpu"))
    if siblings:
        sibling = next((other for other in siblings if other in known), "euler")
        raise UserError(
            f"Solver {name!r} adds noise while it samples, but DGPO needs a deterministic one: use {sibling!r}."
        )
    near = difflib.get_close_matches(plain, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? Else " if near else ""
    raise UserError(f"Solver {name!r} does not exist for {what_for}: {hint}use one of {', '.join(known)}.")


def find(name: str, known: Container[str]) -> str:
    """The one of `known` that a solver's name stands for, in whatever spelling; empty where there is none."""
    plain = _plain(name)
    return next((other for other in (plain, _ALIASES.get(plain, plain)) if other in known), "")


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _siblings(plain: str) -> tuple[str, ...]:
    """What to use instead of a solver that adds noise; empty for a name that does not sound of it."""
    if plain.endswith(("_sde", "_ancestral")) or "_sde_" in plain or "_ancestral_" in plain:
        return _NOISY.get(plain, ("dpmpp_2m",))
    return _NOISY.get(plain, ())


def make_solver(
    name: str,
    scheduler_config: Mapping[str, Any],
    prediction: Prediction,
    steps: int,
    shift: float | None = None,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
) -> SchedulerSolver:
    """The solver `name` on a checkpoint's scheduler config; see `Schedule` for the arguments.

    Raises UserError for an unknown or noisy name, steps < 1, or a missing mu.
    """
    name = check_solver(name, prediction.name)
    if not 1 <= steps <= prediction.num_train_timesteps:
        raise UserError(f"A solver takes 1 to {prediction.num_train_timesteps} steps, not {steps}.")
    schedule = Schedule(scheduler_config, steps, shift, mu, sigmas)
    if prediction.name == "flow" and schedule.dynamic and mu is None:
        raise UserError("This model shifts its noise levels with the image size: give `mu` (or a fixed `shift`).")
    scheduler, reset = SOLVERS[prediction.name][name](schedule)
    reset()
    levels = scheduler.timesteps.float().unique(sorted=True).flip(0)
    return SchedulerSolver(name, levels, len(scheduler.timesteps), scheduler, reset)
