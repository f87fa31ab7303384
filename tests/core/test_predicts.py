"""What a checkpoint predicts: every sign of it, what happens where they disagree, and that it is then drawn right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import tiny
import torch
from checkpoints import CASES
from diffusers import DDIMScheduler

from dgpo_core.common.errors import UserError
from dgpo_core.policy import load_policy
from dgpo_core.policy.families.sd15 import SD15
from dgpo_core.policy.loading.header import Entry, Header
from dgpo_core.policy.loading.predicts import Evidence, Sign, decide, of_header, of_scheduler

pytestmark = pytest.mark.slow

UNET = ("epsilon", "v", "flow")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
EPSILON = {"_class_name": "EulerDiscreteScheduler", **BETAS}
V = {**EPSILON, "prediction_type": "v_prediction"}


def header(*keys: str, **metadata: str) -> Header:
    named = {key.replace("__", "."): value for key, value in metadata.items()}
    return Header(Path("model.safetensors"), named, dict.fromkeys(keys, Entry("F32", (0,))))


def of_file(found: Header, scheduler: dict[str, Any], **options: Any) -> tuple[str, bool]:
    own = of_header(found, UNET, SD15.predicted_by)
    return decide("The model x", own, of_scheduler(scheduler), kinds=UNET, borrowed=True, **options)


SIGNS: dict[str, tuple[Header, dict[str, Any], tuple[str, bool]]] = {
    "nothing but the configs": (header(), EPSILON, ("epsilon", False)),
    "configs of a v model": (header(), V, ("v", False)),
    "configs with zero terminal SNR": (header(), {**V, "rescale_betas_zero_snr": True}, ("v", True)),
    "key v_pred": (header("v_pred"), EPSILON, ("v", False)),
    "keys v_pred and ztsnr": (header("v_pred", "ztsnr"), EPSILON, ("v", True)),
    "modelspec v": (header(modelspec__prediction_type="v"), EPSILON, ("v", False)),
    "modelspec v_prediction": (header(modelspec__prediction_type="V_Prediction"), EPSILON, ("v", False)),
    "modelspec epsilon": (header(modelspec__prediction_type="epsilon"), EPSILON, ("epsilon", False)),
    "modelspec predict_key": (header(modelspec__predict_key="v"), EPSILON, ("v", False)),
    "modelspec flow": (header(modelspec__prediction_type="flow"), EPSILON, ("flow", False)),
    "architecture": (header(modelspec__architecture="stable-diffusion-v2-768-v/x"), EPSILON, ("v", False)),
    "kohya": (header(ss_v_parameterization="True", ss_zero_terminal_snr="True"), EPSILON, ("v", True)),
    "kohya epsilon": (header(ss_v_parameterization="False"), EPSILON, ("epsilon", False)),
    "header and key agree": (header("v_pred", modelspec__prediction_type="v"), EPSILON, ("v", False)),
    "flow scheduler": (header(), {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, ("flow", False)),
    "flow sigmas": (header(), {**EPSILON, "use_flow_sigmas": True}, ("flow", False)),
}


@pytest.mark.parametrize(("found", "scheduler", "expected"), SIGNS.values(), ids=SIGNS)
def test_every_sign_counts(found: Header, scheduler: dict[str, Any], expected: tuple[str, bool]) -> None:
    assert of_file(found, scheduler) == expected


DISAGREE: dict[str, tuple[Header, dict[str, Any], str]] = {
    "key against header": (header("v_pred", modelspec__prediction_type="epsilon"), EPSILON, "contradicts itself"),
    "header against v configs": (header(modelspec__prediction_type="epsilon"), V, "contradicts itself"),
    "key against a flow scheduler": (header("v_pred"), {"_class_name": "FlowMatchHeun"}, "contradicts itself"),
    "kohya against key": (header("v_pred", ss_v_parameterization="False"), EPSILON, "contradicts itself"),
    "zero terminal SNR of epsilon": (header("ztsnr"), EPSILON, "zero terminal SNR .* which is impossible"),
    "EDM": (header(), {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "predicts EDM"),
    "clean images": (header(), {**EPSILON, "prediction_type": "sample"}, "predicts sample"),
    "header of another kind": (header(modelspec__prediction_type="x0"), {}, "predicts x0|contradicts itself"),
    "distilled": (header(), {"_class_name": "LCMScheduler", **BETAS}, "predicts LCM"),
    "other scheduler": (header(), {"_class_name": "CosineScheduler"}, "predicts Cosine"),
}


@pytest.mark.parametrize(("found", "scheduler", "says"), DISAGREE.values(), ids=DISAGREE)
def test_where_signs_disagree_one_sentence_says_so_and_the_setting_decides(
    found: Header, scheduler: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        of_file(found, scheduler)
    assert "model.prediction" in str(caught.value)
    assert of_file(found, scheduler, asked="epsilon") == ("epsilon", False)
    assert of_file(found, scheduler, asked="v")[0] == "v"


def test_the_weights_of_a_folder_and_its_own_scheduler_weigh_the_same() -> None:
    own = Evidence((Sign("v", "its header"),))
    with pytest.raises(UserError, match="contradicts itself"):
        decide("The model x", own, of_scheduler(EPSILON), kinds=UNET)


def test_a_flow_family_predicts_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="predicts flow, not v"):
        load_policy(tiny.folder("sd3"), rank=2, prediction="v")
    folder = checkpoints.copy("sd3", tmp_path / "sd3", {"_class_name": "DDIMScheduler", **BETAS})
    with pytest.raises(UserError, match="predicts epsilon by its scheduler"):
        load_policy(folder, rank=2)
    # trainers write this for flows, too, where it means nothing
    assert of_header(header(ss_v_parameterization="False"), ("flow",), {}).signs == ()


# --- the models ------------------------------------------------------------------------------------------------------


def test_a_v_model_with_zero_terminal_snr_draws_what_diffusers_draws() -> None:
    policy = load_policy(CASES / "sdxl_vpred.safetensors", rank=2)
    assert (policy.family, policy.prediction.name) == ("sdxl", "v")
    theirs = DDIMScheduler(
        **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        clip_sample=False, steps_offset=1,
    )  # fmt: skip
    theirs.set_timesteps(4)
    noise = torch.randn(1, *policy.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    (cond,) = policy.encode(["red"])
    solver = policy.solver("ddim", 4, 32, 32)
    assert solver.timesteps.tolist() == theirs.timesteps.tolist() == [999, 749, 499, 249]
    latent = noise
    with torch.no_grad():
        for t in theirs.timesteps:
            velocity = policy.predict(latent, t[None].float(), cond)
            latent = theirs.step(velocity, t, latent, return_dict=False)[0]
        ours = policy.sample(solver, noise, cond, cond, 1.0, lambda: None)
    assert latent.isfinite().all()
    # the same modules and the same table: nothing but the order of a few float32 operations
    torch.testing.assert_close(ours, latent, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp_2m", "unipc"])
def test_from_the_terminal_step_on_training_and_drawing_stay_finite(solver: str) -> None:
    policy = load_policy(CASES / "sdxl_vpred.safetensors", rank=2)
    made = policy.solver(solver, 4, 32, 32)
    last = made.timesteps[:1]
    alpha, sigma = policy.prediction.coefficients(last)
    assert (alpha.item(), sigma.item()) == (0.0, 1.0)
    x0, eps = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(policy.prediction.add_noise(x0, eps, last), eps)
    assert torch.equal(policy.prediction.target(x0, eps, last), -x0)
    assert torch.equal(policy.prediction.x0_from(eps, -x0, last), x0)
    noise = torch.randn(1, *policy.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    (cond,) = policy.encode(["red"])
    assert policy.sample(made, noise, cond, cond, 1.0, lambda: None).isfinite().all()


def test_an_edm_folder_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="predicts EDM by its scheduler .EDMDPMSolverMultistepScheduler."):
        load_policy(CASES / "g_playground-like_EDM", rank=2)


def test_a_unet_beside_a_flow_scheduler_is_a_flow(tmp_path: Path) -> None:
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
    policy = load_policy(checkpoints.copy("sdxl", tmp_path / "flow", scheduler), rank=2)
    assert policy.prediction.name == "flow"
    assert policy.solver("euler", 4, 32, 32).timesteps[0] == 1000
    x0, eps = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy.prediction.target(x0, eps, torch.tensor([500.0])), eps - x0)
    with pytest.raises(UserError, match="depends on the image's size"):
        load_policy(checkpoints.copy("sdxl", tmp_path / "b", {**scheduler, "use_dynamic_shifting": True}), rank=2)


def test_the_setting_decides_for_a_file(tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "model.safetensors", checkpoints.tensors(tmp_path))
    for prediction in ("epsilon", "v", "flow"):
        policy = load_policy(path, rank=2, prediction=prediction)
        assert policy.prediction.name == prediction
        assert policy.lora_metadata({})["modelspec.prediction_type"].startswith(prediction[:1])
    with pytest.raises(UserError, match="Unknown prediction 'w'"):
        load_policy(path, rank=2, prediction="w")
