"""Predictions against hand-worked numbers and against diffusers' own tables."""

import pytest
import torch
from diffusers import DDIMScheduler

from dgpo_core.common.errors import UserError
from dgpo_core.diffusion.prediction import Epsilon, Flow, Prediction, V, prediction_from_config

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def predictions() -> list[Prediction]:
    return [
        Flow(),
        prediction_from_config({**CONFIG, "prediction_type": "epsilon"}),
        prediction_from_config({**CONFIG, "prediction_type": "v_prediction"}),
        prediction_from_config({**CONFIG, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ]


def test_flow_by_hand() -> None:
    x0, eps, t = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0), torch.tensor([250.0])
    flow = Flow()
    assert flow.add_noise(x0, eps, t).item() == 0.75 * 2 + 0.25 * -1
    assert flow.target(x0, eps, t).item() == -3
    assert flow.x0_from(torch.full((1, 1, 1, 1), 1.25), torch.full((1, 1, 1, 1), -3.0), t).item() == 2
    assert flow.level(t).item() == 0.25


def test_epsilon_and_v_by_hand() -> None:
    table = torch.tensor([0.99, 0.64])  # alpha 0.8, sigma 0.6 at t = 1
    x0, eps, t = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0), torch.tensor([1.0])
    epsilon, v = (kind(num_train_timesteps=2, alphas_cumprod=table) for kind in (Epsilon, V))
    for kind in (epsilon, v):
        torch.testing.assert_close(kind.add_noise(x0, eps, t).item(), 0.8 * 2 - 0.6)
        assert kind.level(t).item() == 0.5
    assert epsilon.target(x0, eps, t).item() == -1
    torch.testing.assert_close(v.target(x0, eps, t).item(), 0.8 * -1 - 0.6 * 2)


@pytest.mark.parametrize("prediction", predictions(), ids=lambda p: p.name)
def test_the_target_leads_back_to_the_clean_latent_at_every_level(prediction: Prediction) -> None:
    x0, eps = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([999.0, 750.0, 500.0, 100.0, 1.0])
    x_t = prediction.add_noise(x0, eps, t)
    back = prediction.x0_from(x_t, prediction.target(x0, eps, t), t)
    # epsilon divides by alpha, down to 0.068 at t = 999: 1e-4 is float32's 1e-7 times 1 / alpha, times a margin
    torch.testing.assert_close(back, x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_noise_table_is_the_schedulers_own(zero_snr: bool) -> None:
    config = {**CONFIG, "prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    prediction, scheduler = prediction_from_config(config), DDIMScheduler(**config)
    x0, eps = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([999, 400, 0])
    torch.testing.assert_close(prediction.add_noise(x0, eps, t.float()), scheduler.add_noise(x0, eps, t))
    torch.testing.assert_close(prediction.target(x0, eps, t.float()), scheduler.get_velocity(x0, eps, t))
    if zero_snr:
        assert torch.equal(prediction.add_noise(x0, eps, t.float())[0], eps[0])


def test_timesteps_between_two_entries_are_rounded() -> None:
    epsilon = predictions()[1]
    for a, b in zip(
        epsilon.coefficients(torch.tensor([500.4])), epsilon.coefficients(torch.tensor([500.0])), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("prediction", predictions(), ids=lambda p: p.name)
def test_the_dtype_of_the_latent_is_kept(prediction: Prediction) -> None:
    x0, eps, t = torch.randn(2, 4, 2, 2).bfloat16(), torch.randn(2, 4, 2, 2).bfloat16(), torch.tensor([10.0, 900.0])
    x_t = prediction.add_noise(x0, eps, t)
    pred = prediction.target(x0, eps, t)
    assert {x_t.dtype, pred.dtype, prediction.x0_from(x_t, pred, t).dtype} == {torch.bfloat16}


def test_epsilon_at_zero_snr_stays_finite() -> None:
    epsilon = prediction_from_config({**CONFIG, "rescale_betas_zero_snr": True})
    x = torch.ones(1, 1, 2, 2)
    assert epsilon.x0_from(x, x * 0.5, torch.tensor([999.0])).isfinite().all()


def test_an_unsupported_prediction_type_is_told() -> None:
    with pytest.raises(UserError, match="'sample'"):
        prediction_from_config({**CONFIG, "prediction_type": "sample"})
