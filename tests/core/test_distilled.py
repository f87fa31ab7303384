"""Models that were distilled to few steps: found by what is known of them, and told before anything is drawn."""

from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import tiny
import torch
from engine import moved

from dgpo_core.common.errors import UserError
from dgpo_core.policy import distilled, load_policy
from dgpo_core.policy.distilled import FewSteps
from dgpo_core.policy.lora import file as lora_file
from dgpo_core.policy.lora import names as lora_names
from dgpo_core.policy.lora.merge import merge_
from dgpo_core.runs import assemble
from dgpo_core.runs.few_steps import few_steps_warning
from dgpo_core.settings.config import Config, EvalConfig, ModelConfig, RolloutConfig
from dgpo_core.settings.validation import validate

pytestmark = pytest.mark.slow

NAMED = {
    "flux1-schnell-fp8.safetensors": ("FLUX schnell", 4),
    "stabilityai/sdxl-turbo": ("Turbo", 4),
    "sd_xl_turbo_1.0_fp16.safetensors": ("Turbo", 4),
    "z_image_turbo_bf16.safetensors": ("Z-Image Turbo", 8),
    "sdxl_lightning_8step_lora.safetensors": ("Lightning", 8),
    "realvisxlV40_v40LightningBakedvae.safetensors": ("Lightning", 4),
    "DreamShaperXL_v2TurboDPMSDE.safetensors": ("Turbo", 4),
    "Hyper-SDXL-8steps-lora.safetensors": ("Hyper", 8),
    "lcm-lora-sdv1-5.safetensors": ("LCM", 4),
    "dmd2_sdxl_4step_unet.safetensors": ("DMD", 4),
    "flux-2-klein-4b.safetensors": ("FLUX.2 klein", 4),
    "Qwen-Image-Lightning-4steps-V1.0.safetensors": ("Lightning", 4),
    "HiDream-ai/HiDream-I1-Fast": ("HiDream-I1 Fast", 16),
    "hidream_i1_dev_bf16.safetensors": ("HiDream-I1 Dev", 28),
    "my_model_2step.safetensors": ("few-step", 2),
}
PLAIN = (
    "sd_xl_base_1.0.safetensors", "hyperrealism_v3.safetensors", "flux1-dev.safetensors", "flux-2-klein-base-4b",
    "flux-dev-de-distill.safetensors", "Z-Image-De-Turbo", "enlightening.safetensors", "model_50000steps.safetensors",
    "lora_30steps.safetensors", "SD3.5-medium", "HiDream-I1-Full",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_the_names_of_few_step_models_say_their_kind_and_steps(name: str) -> None:
    found = distilled.in_name(name, "its name")
    assert found == FewSteps(*NAMED[name], "its name")


@pytest.mark.parametrize("name", PLAIN)
def test_names_of_other_models_say_nothing(name: str) -> None:
    assert distilled.in_name(name, "its name") is None


def test_header_and_scheduler_say_it_where_the_name_does_not() -> None:
    by_header = distilled.find(["model.safetensors"], {"modelspec.architecture": "flux-1-schnell", "comment": "lcm"})
    assert by_header
    assert by_header.kind == "FLUX schnell"
    assert "modelspec.architecture" in by_header.sign
    assert distilled.find(["model"], {"comment": "an lcm"}) is None
    by_scheduler = distilled.find(["model"], {}, "LCMScheduler")
    assert by_scheduler
    assert by_scheduler.kind == "LCM"
    by_config = distilled.by_config("flux", {"guidance_embeds": False}, {"use_dynamic_shifting": False})
    assert by_config
    assert by_config.kind == "FLUX schnell"
    assert distilled.by_config("flux", {"guidance_embeds": True}, {"use_dynamic_shifting": True}) is None
    assert distilled.by_config("sd3", {}, {"use_dynamic_shifting": False}) is None


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/models/sdxl-turbo/x.safetensors", ["x.safetensors"]),  # a folder of many models names none of them
        ("stabilityai/sdxl-turbo", ["stabilityai/sdxl-turbo"]),
        ("/c/models--stabilityai--sdxl-turbo/snapshots/0af", ["models--stabilityai--sdxl-turbo", "0af"]),
        (r"C:\models\a.safetensors", ["a.safetensors"]),
    ],
)
def test_a_path_names_a_model_by_its_end_or_its_place_on_the_hub(path: str, names: list[str]) -> None:
    assert distilled.names_of(path) == names


def test_the_advice_names_what_is_set_otherwise_and_nothing_else() -> None:
    few = FewSteps("Lightning", 4, "its name")
    told = few_steps_warning(few, RolloutConfig(), EvalConfig(steps=4, cfg=1.0))
    assert "rollout.steps 4 (now 10)" in told
    assert "rollout.cfg 1 (now 4.5)" in told
    assert "evaluation" not in told
    assert "model.distilled no" in told
    assert "train it as it draws" not in few_steps_warning(few, RolloutConfig(steps=4, cfg=1.0))
    assert few_steps_warning(None, RolloutConfig()) == ""


def test_a_folder_called_turbo_is_found_and_no_means_no(tmp_path: Path) -> None:
    folder = checkpoints.copy("sd3", tmp_path / "sd3-turbo")
    policy = load_policy(folder, rank=2)
    assert policy.few_steps
    assert policy.few_steps.kind == "Turbo"
    for asked, steps in (("auto", 4), ("2", 2), ("no", None)):
        found = distilled.settled(asked, policy.few_steps)
        assert (found and found.steps) == steps
    assert load_policy(tiny.folder("sd3"), rank=2).few_steps is None


@pytest.mark.parametrize("value", ["yes", "0", "17", "-4", "4.0", "٤", ""])
def test_what_distilled_cannot_be_is_told(value: str) -> None:
    with pytest.raises(UserError, match="model.distilled is .* must be auto, no, or the number of steps"):
        validate(Config(model=ModelConfig(distilled=value)))


def test_settings_decide_what_a_loaded_policy_is() -> None:
    policy = load_policy(tiny.folder("sd3"), rank=2)
    assemble.set_up(policy, Config(model=ModelConfig(distilled="3")))
    assert policy.few_steps == FewSteps("few-step", 3, "model.distilled")


def test_a_few_step_lora_is_part_of_the_base(tmp_path: Path) -> None:
    """The base with the LoRA merged predicts what the adapter of that LoRA predicts, and is what is compared with."""
    trained = load_policy(tiny.folder("sd3"), rank=2, seed=1)
    moved(trained, "current", seed=2, size=0.1)
    path = tmp_path / "tiny_lightning_2step.safetensors"
    trained.save_lora(path)
    merged = load_policy(tiny.folder("sd3"), rank=2, few_step_lora=path)
    assert merged.few_steps
    assert (merged.few_steps.kind, merged.few_steps.steps) == ("Lightning", 2)
    cond = trained.encode(["a"])[0]
    x, t = torch.randn(1, *trained.latent_shape(*trained.default_size)), torch.tensor([500.0])
    with torch.no_grad():
        with trained.using("current"):
            wanted = trained.predict(x, t, cond)
        with trained.using(None):
            plain = trained.predict(x, t, cond)
        with merged.using(None):
            found = merged.predict(x, t, cond)
    assert torch.allclose(found, wanted, atol=1e-5)  # one product in float32, summed in another order
    assert not torch.allclose(found, plain, atol=1e-3)


def test_a_few_step_lora_is_never_lost_in_a_packed_base(tmp_path: Path) -> None:
    """A GGUF file's layers make their weight anew at every look: what is added to that is gone."""
    trained = load_policy(tiny.folder("sd3"), rank=2, seed=1)
    moved(trained, "current", seed=2, size=0.1)
    trained.save_lora(tmp_path / "turbo.safetensors")
    packed = load_policy(tiny.folder("sd3"), rank=2, quantize="int8").network
    lora = lora_names.resolve(lora_file.read(tmp_path / "turbo.safetensors"), packed, type(trained).makers_names)
    named = {name: f"{name}.base_layer" for name in lora.weights}  # of a network that has adapters already
    within = replace(lora, weights={named[name]: pair for name, pair in lora.weights.items()})
    with pytest.raises(UserError, match="packed in their file .GGUF.: take the same model as .safetensors, and set"):
        merge_(within, packed)
