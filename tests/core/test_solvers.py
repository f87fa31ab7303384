"""Solvers: deterministic, refused where they are not, and equal to what diffusers' pipelines draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_pipeline
import pytest
import tiny
import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.diffusion.prediction import Flow, Prediction, prediction_from_config
from dgpo_core.diffusion.solvers import SOLVERS, Solver, check_solver, make_solver
from dgpo_core.policy import Cond, guided, load_policy
from dgpo_core.policy.pipeline import DiffusersPolicy

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
V = {"prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("sd15", {}),
    "sd15-v": ("sd15", V),
    "sd15-v-zero-snr": ("sd15", ZERO_SNR),
    "sdxl": ("sdxl", {}),
    "sdxl-v": ("sdxl", V),
    "sd3": ("sd3", {}),
    "sd3-dynamic": ("sd3", {"use_dynamic_shifting": True}),
    "flux": ("flux", {}),
    "zimage": ("zimage", {}),
    "qwenimage": ("qwenimage", {}),
    "flux2": ("flux2", {}),
    "chroma": ("chroma", {}),
    "sana": ("sana", {}),
    "hidream": ("hidream", {}),
    "wan": ("wan", {}),
}


def _has_solver(model: str, name: str) -> bool:
    return not (model.endswith("zero-snr") and name == "plms")


MATRIX = [
    (model, name)
    for model, (family, _) in MODELS.items()
    for name in SOLVERS["epsilon" if family in ("sd15", "sdxl") else "flow"]
    if _has_solver(model, name)
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DiffusersPolicy]:
    """Policies by the names of MODELS, each made once; with a trained-looking adapter in none of them."""
    made: dict[str, DiffusersPolicy] = {}

    def get(model: str) -> DiffusersPolicy:
        if model not in made:
            family, scheduler = MODELS[model]
            folder: Path = tmp_path_factory.mktemp(model)
            made[model] = load_policy(tiny.save(family, folder, **scheduler), rank=2)
        return made[model]

    return get


def _noise(policy: DiffusersPolicy, n: int) -> Tensor:
    return torch.randn(n, *policy.latent_shape(tiny.SIZE, tiny.SIZE), generator=torch.Generator().manual_seed(3))


def _sample(policy: DiffusersPolicy, solver: Solver, noise: Tensor, cond: Cond) -> Tensor:
    return solver.sample(lambda x, t: policy.predict(x, t, cond), noise)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), MATRIX)
def test_same_noise_same_image_bit_for_bit_and_whatever_its_batch(policy: Any, model: str, name: str) -> None:
    p = policy(model)
    solver = p.solver(name, 3, tiny.SIZE, tiny.SIZE)
    noise, cond = _noise(p, 3), Cond.cat(p.encode(["a red circle", "two blue squares", ""]))
    first = _sample(p, solver, noise, cond)
    assert torch.equal(first, _sample(p, solver, noise, cond))
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    alone = _sample(p, solver, noise[1:2], cond.select([1]))
    # matrix products of another batch size may add in another order: float32's 1e-7 per operation, grown by a few steps
    torch.testing.assert_close(alone[0], first[1], atol=1e-4, rtol=1e-4)


_NOT_IN_DIFFUSERS = {
    "flux": ("heun", "dpmpp_2m"),  # Heun has no dynamic shift, and DPM-Solver's raises there
    "sd3-dynamic": ("heun", "dpmpp_2m"),
    "zimage": ("heun", "dpmpp_2m", "unipc"),  # its pipeline gives levels of its own, as Euler's alone takes them
    "qwenimage": ("heun", "dpmpp_2m", "unipc"),
    "flux2": ("heun", "dpmpp_2m"),
    "chroma": ("heun", "dpmpp_2m", "unipc"),
    "hidream": ("heun", "dpmpp_2m"),  # its pipeline gives every scheduler but UniPC's a mu
}
"""Where a family's pipeline does not run with a solver: no reference to compare with."""


def _not_in_diffusers(model: str, name: str) -> bool:
    return name in _NOT_IN_DIFFUSERS.get(model, ())


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), [case for case in MATRIX if not _not_in_diffusers(*case)])
def test_a_solver_draws_what_the_diffusers_pipeline_draws(policy: Any, model: str, name: str) -> None:
    p = policy(model)
    noise, cond = _noise(p, 2), Cond.cat(p.encode(["a red circle", "two blue squares"]))
    ours = _sample(p, p.solver(name, 4, tiny.SIZE, tiny.SIZE), noise, cond)
    theirs = own_pipeline.latents(p, name, noise, cond, steps=4)
    # the same modules on the same inputs; the levels may differ by float32's rounding where ours are worked out ahead
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["sd15", "sd3", "zimage", "qwenimage", "flux2", "chroma", "sana", "hidream", "wan"])
def test_guidance_is_the_pipelines(policy: Any, model: str) -> None:
    p = policy(model)
    cond, uncond = p.encode(["a red circle", ""])
    noise = _noise(p, 1)
    solver = p.solver("euler", 3, tiny.SIZE, tiny.SIZE)
    ours = solver.sample(lambda x, t: guided(p, x, t, cond, uncond, 4.5), noise)
    theirs = own_pipeline.latents(p, "euler", noise, cond, 3, uncond, 4.5)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def _linear_model(prediction: Prediction, x0: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The perfect network of a world that holds only the latent x0."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in prediction.coefficients(t))
        return prediction.target(x0, (x - alpha * x0) / sigma, t)

    return predict


@pytest.mark.parametrize("name", SOLVERS["flow"])
def test_a_perfect_flow_model_is_led_to_its_image(name: str) -> None:
    x0, noise = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    solver = make_solver(name, {"shift": 3.0}, Flow(), 8)
    # the multistep solvers truncate the model's timestep to a whole number, as diffusers has it: up to 1e-3 in sigma
    torch.testing.assert_close(solver.sample(_linear_model(Flow(), x0), noise), x0, atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_perfect_diffusion_model_is_led_to_its_image(name: str, kind: str) -> None:
    x0, noise = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    config = {**BETAS, "prediction_type": kind}
    prediction = prediction_from_config(config)
    # the last level's noise is all that can be left: sigma 0.03 at t = 1
    out = make_solver(name, config, prediction, 8).sample(_linear_model(prediction, x0), noise)
    torch.testing.assert_close(out, x0, atol=5e-2, rtol=0)


@pytest.mark.parametrize(("name", "calls"), [("euler", 4), ("heun", 7), ("dpmpp_2m", 4), ("unipc", 4)])
def test_timesteps_are_the_distinct_levels_and_calls_are_reported(name: str, calls: int) -> None:
    solver = make_solver(name, {"shift": 3.0}, Flow(), 4)
    seen: list[float] = []
    steps: list[tuple[int, int]] = []
    noise = torch.zeros(2, 1, 2, 2)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,)
        assert t.dtype == torch.float32
        seen.append(t[0].item())
        return torch.zeros_like(x)

    solver.sample(predict, noise, on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(i + 1, calls) for i in range(calls)]
    assert solver.calls == calls
    assert len(solver.timesteps) == 4
    assert solver.timesteps.tolist() == sorted(set(seen), reverse=True)


def test_a_sample_that_was_interrupted_leaves_no_trace() -> None:
    for name in SOLVERS["flow"]:
        solver = make_solver(name, {"shift": 3.0}, Flow(), 4)
        noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        predict = _linear_model(Flow(), torch.ones(1, 1, 4, 4))
        before = solver.sample(predict, noise)
        calls = iter([True, False])

        def stop(x: Tensor, t: Tensor, calls: Any = calls) -> Tensor:
            if not next(calls):
                raise KeyboardInterrupt
            return x

        with pytest.raises(KeyboardInterrupt):
            solver.sample(stop, noise)
        assert torch.equal(solver.sample(predict, noise), before), name


def test_the_model_sees_the_scaled_input_of_eulers_epsilon() -> None:
    config = {**BETAS, "timestep_spacing": "leading"}
    prediction = prediction_from_config(config)
    inputs: list[Tensor] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        inputs.append(x)
        return x

    noise = torch.ones(1, 1, 2, 2)
    make_solver("euler", config, prediction, 4).sample(predict, noise)
    # k-diffusion's x is alpha-free: what the model gets is x / sqrt(sigma^2 + 1), of unit variance at the start
    torch.testing.assert_close(inputs[0], noise, atol=1e-5, rtol=1e-5)


def test_a_fixed_shift_replaces_the_models() -> None:
    config = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    for name in SOLVERS["flow"]:
        plain = make_solver(name, {"shift": 1.0}, Flow(), 4).timesteps
        assert torch.equal(make_solver(name, config, Flow(), 4, shift=1.0).timesteps, plain)
        assert make_solver(name, config, Flow(), 4, shift=6.0).timesteps[1] > plain[1]


def test_a_dynamic_shift_without_the_image_size_is_told() -> None:
    for name in SOLVERS["flow"]:
        with pytest.raises(UserError, match="mu"):
            make_solver(name, {"use_dynamic_shifting": True}, Flow(), 4)


@pytest.mark.parametrize(
    ("name", "kind", "sibling"),
    [
        ("euler_ancestral", "flow", "euler"),
        ("Euler_A", "epsilon", "euler"),
        ("dpmpp_sde", "epsilon", "dpmpp_2m"),
        ("dpmpp_2m_sde", "v", "dpmpp_2m"),
        ("dpmpp_2m_sde_gpu", "v", "dpmpp_2m"),
        ("lcm", "flow", "euler"),
        ("ddpm", "epsilon", "ddim"),
        ("tcd", "v", "ddim"),
        ("my_ancestral", "flow", "dpmpp_2m"),
    ],
)
def test_a_solver_that_adds_noise_is_refused_with_its_deterministic_sibling(name: str, kind: str, sibling: str) -> None:
    with pytest.raises(UserError, match=f"adds noise.*'{sibling}'"):
        check_solver(name, kind)


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "dpmsolver++"])
def test_a_noisy_setting_of_the_checkpoint_is_overruled(algorithm: str) -> None:
    config = {**BETAS, "algorithm_type": algorithm, "stochastic_sampling": True}
    noise = torch.ones(1, 1, 2, 2)
    for name, prediction in (("dpmpp_2m", prediction_from_config(config)), ("euler", Flow())):
        solver = make_solver(name, config, prediction, 3)
        a, b = (solver.sample(lambda x, t: x, noise) for _ in range(2))
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [("eulr", "flow", "'euler'"), ("ddim", "flow", "euler, heun"), ("heun", "v", "ddim"), ("", "v", "does not exist")],
)
def test_an_unknown_solver_is_told_with_the_known_ones(name: str, kind: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_solver(name, kind)


def test_impossible_settings_are_told() -> None:
    with pytest.raises(UserError, match="steps, not 0"):
        make_solver("euler", {}, Flow(), 0)
    config = {**BETAS, "rescale_betas_zero_snr": True, **V}
    with pytest.raises(UserError, match="zero terminal SNR"):
        make_solver("plms", config, prediction_from_config(config), 4)
