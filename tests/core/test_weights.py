"""The numbers of a checkpoint: scales applied, other quantisation refused, and what is missing or no number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import tiny
import torch
from checkpoints import CASES
from safetensors.torch import load_file
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.policy import Cond, load_policy
from dgpo_core.policy.families import sd15
from dgpo_core.policy.families.sd15 import SD15
from dgpo_core.policy.loading import single_file
from dgpo_core.policy.loading.folder import Folder
from dgpo_core.policy.pipeline import DiffusersPolicy

pytestmark = pytest.mark.slow

FP8 = torch.float8_e4m3fn
State = dict[str, Tensor]
NETWORK = "model.diffusion_model."


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> State:
    """A tiny SD1.5 as one checkpoint."""
    return checkpoints.tensors(tmp_path_factory.mktemp("plain"))


def prediction(policy: DiffusersPolicy) -> Tensor:
    x = torch.randn(2, *policy.latent_shape(tiny.SIZE, tiny.SIZE), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return policy.predict(x, torch.tensor([900.0, 300.0]), Cond.cat(policy.encode(["red", "blue"])))


def scaled(state: State, name: str, per_row: bool = False, **more: Tensor) -> tuple[State, State]:
    """The checkpoint with its Linears in scaled fp8, and what that stands for; name: of the scale."""
    stored, plain = dict(state), dict(state)
    for key, weight in state.items():
        if key.startswith(NETWORK) and key.endswith(".weight") and weight.ndim == 2:
            module = key.removesuffix(".weight")
            scale = weight.abs().amax(dim=1, keepdim=True) / 448 if per_row else weight.abs().max() / 448
            stored[key] = (weight / scale).to(FP8)
            plain[key] = stored[key].float() * scale
            stored[f"{module}.{name}"] = scale
            stored |= {f"{module}.{key}": value.clone() for key, value in more.items()}
    return stored, plain


def bytes_of(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


FORMS: dict[str, tuple[str, bool, dict[str, Tensor]]] = {
    "scale_weight": ("scale_weight", False, {"scale_input": torch.ones(())}),
    "weight_scale": ("weight_scale", False, {"input_scale": torch.ones(1)}),
    "weight_scale by row": ("weight_scale", True, {}),
    "comfy_quant": ("weight_scale", False, {"comfy_quant": bytes_of(json.dumps({"format": "float8_e4m3fn"}))}),
}


@pytest.mark.parametrize(("name", "per_row", "more"), FORMS.values(), ids=FORMS)
def test_scaled_fp8_is_multiplied_by_its_scales(
    name: str, per_row: bool, more: dict[str, Tensor], state: State, tmp_path: Path
) -> None:
    stored, plain = scaled(state, name, per_row, **more)
    stored[NETWORK + "scaled_fp8"] = torch.zeros(2, dtype=FP8)
    found = prediction(load_policy(checkpoints.write(tmp_path / "scaled.safetensors", stored), rank=2))
    assert torch.equal(found, prediction(load_policy(checkpoints.write(tmp_path / "b.safetensors", plain), rank=2)))


def test_the_case_of_scaled_fp8_has_the_weights_that_its_scales_say() -> None:
    policy = load_policy(CASES / "sd15_fp8s.safetensors", rank=2)
    found = policy.network.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").base_layer.weight
    stored = load_file(CASES / "sd15_fp8s.safetensors")
    module = NETWORK + "middle_block.1.transformer_blocks.0.attn1.to_q"
    assert torch.equal(found, stored[f"{module}.weight"].float() * stored[f"{module}.scale_weight"])


def test_plain_fp8_is_read_as_the_numbers_it_holds(state: State, tmp_path: Path) -> None:
    stored = {key: value.to(FP8) if value.ndim > 1 else value for key, value in state.items()}
    plain = {key: value.float() for key, value in stored.items()}
    found = prediction(load_policy(checkpoints.write(tmp_path / "fp8.safetensors", stored), rank=2))
    assert torch.equal(found, prediction(load_policy(checkpoints.write(tmp_path / "b.safetensors", plain), rank=2)))


def test_sft_is_safetensors_under_a_shorter_name(state: State, tmp_path: Path) -> None:
    found = prediction(load_policy(checkpoints.write(tmp_path / "model.sft", state), rank=2))
    assert torch.equal(found, prediction(load_policy(tiny.folder("sd15"), rank=2)))


def without(mark: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if mark not in key}


def with_number(key: str, number: float) -> Callable[[State], State]:
    def change(state: State) -> State:
        changed = state[key].clone()
        changed.view(-1)[0] = number
        return {**state, key: changed}

    return change


REFUSED: dict[str, tuple[Callable[[State], State], str]] = {
    "no VAE": (without("first_stage_model."), "no whole vae"),
    "no text encoder": (without("cond_stage_model."), "no whole text_encoder"),
    "half a network": (without("middle_block."), "no weights for a part of its unet"),
    "a larger network": (lambda s: {**s, NETWORK + "input_blocks.9.w": torch.zeros(9)}, "of another model"),
    "NaN": (with_number(NETWORK + "out.2.weight", float("nan")), "not finite numbers in unet.conv_out.weight"),
    "infinite": (with_number("first_stage_model.decoder.conv_in.weight", float("inf")), "not finite numbers in vae"),
    "int8": (lambda s: {**s, NETWORK + "out.2.weight": s[NETWORK + "out.2.weight"].to(torch.int8)}, "of type I8"),
    "unknown scales": (
        lambda s: {**s, NETWORK + "x.weight": torch.zeros(2, 2, dtype=FP8), NETWORK + "x.scale_rows": torch.ones(2)},
        "scale_rows",
    ),
    "scales of blocks": (lambda s: {**s, NETWORK + "out.2.scale_weight": torch.ones(2, 3)}, "has scales of shape"),
    "scale of nothing": (lambda s: {**s, NETWORK + "gone.scale_weight": torch.ones(())}, "no weight beside it"),
    "unknown format": (
        lambda s: {**s, NETWORK + "out.2.comfy_quant": bytes_of('{"format": "mxfp8"}')},
        "of format mxfp8",
    ),
    "format that is no JSON": (lambda s: {**s, NETWORK + "out.2.comfy_quant": bytes_of("{")}, "not valid JSON"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
def test_weights_that_would_be_read_wrongly_are_refused(
    change: Callable[[State], State], says: str, state: State, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load_policy(checkpoints.write(tmp_path / "model.safetensors", change(state)), rank=2)
    assert "\n" not in str(caught.value)


def test_a_part_that_a_file_lacks_comes_from_the_folder_beside_it(state: State, tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "model.safetensors", without("first_stage_model.")(state))
    shutil.rmtree(tmp_path / "model" / "vae")
    shutil.copytree(tiny.folder("sd15") / "vae", tmp_path / "model" / "vae")
    policy, whole = load_policy(path, rank=2), load_policy(tiny.folder("sd15"), rank=2)
    latents = torch.ones(1, *policy.latent_shape(tiny.SIZE, tiny.SIZE))
    assert torch.equal(policy.decode(latents), whole.decode(latents))


def test_an_sdxl_without_text_projection_is_told(tmp_path: Path) -> None:
    path = tmp_path / "sdxl.safetensors"
    changed = without("text_projection")(load_file(CASES / "sdxl_vpred.safetensors"))
    checkpoints.write(path, changed)
    with pytest.raises(UserError, match="no whole text_encoder_2"):
        load_policy(path, rank=2)


def test_the_encoders_of_flux_in_one_file_are_those_of_its_folder() -> None:
    folder, pipe = Folder(str(tiny.folder("flux"))), tiny.shared("flux").pipe
    clip = {f"text_model.{key.removeprefix('text_model.')}": v for key, v in pipe.text_encoder.state_dict().items()}
    t5 = {key: v for key, v in pipe.text_encoder_2.state_dict().items() if key != "encoder.embed_tokens.weight"}
    state = {f"text_encoders.clip_l.transformer.{key}": v for key, v in clip.items()}
    state |= {f"text_encoders.t5xxl.transformer.{key}": v for key, v in t5.items()}
    for name in ("text_encoder", "text_encoder_2"):
        found, expected = single_file._component(folder, name, state, torch.float32, "It"), getattr(pipe, name)
        pairs = zip(found.state_dict().values(), expected.state_dict().values(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize(("spread", "expected"), [(0.2, "v"), (0.02, "epsilon")])
def test_sd2_without_a_sign_is_told_apart_by_the_spread_of_a_bias(spread: float, expected: str) -> None:
    bias = spread * torch.linspace(-1.7, 1.7, 320)
    wide, narrow = (torch.empty(320, width, device="meta") for width in (1024, 768))
    assert SD15.prediction_of_weights({sd15._SD2_WIDTH_MARK: wide, sd15._SD2_V_MARK: bias}) == expected
    assert SD15.prediction_of_weights({sd15._SD2_WIDTH_MARK: narrow, sd15._SD2_V_MARK: bias}) == ""  # SD 1.x


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["*/*.safetensors", "unet/*.safetensors"])
def test_a_folder_that_has_fp16_files_alone_is_read(which: str, tmp_path: Path) -> None:
    folder = checkpoints.copy("sdxl", tmp_path / "half")
    for path in folder.glob(which):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert torch.equal(prediction(load_policy(folder, rank=2)), prediction(tiny.shared("sdxl")))


FOLDERS: dict[str, tuple[str, Callable[[State], State], str]] = {
    "part of the network": ("unet", without("attn1.to_q"), "no weights for unet"),
    "text_projection": ("text_encoder_2", without("text_projection"), "text_encoder_2.text_projection.weight"),
    "NaN": ("vae", with_number("decoder.conv_in.weight", float("nan")), "not finite numbers in vae.decoder.conv_in"),
    "scaled fp8": ("unet", lambda s: {**s, "conv_out.scale_weight": torch.ones(())}, "in scaled fp8"),
    "int8": ("unet", lambda s: {**s, "conv_in.weight": s["conv_in.weight"].to(torch.int8)}, "of type I8"),
}


@pytest.mark.parametrize(("component", "change", "says"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_with_damaged_weights_is_refused(
    component: str, change: Callable[[State], State], says: str, tmp_path: Path
) -> None:
    folder = checkpoints.copy("sdxl", tmp_path / "model")
    checkpoints.change(folder, component, change)
    with pytest.raises(UserError, match=says):
        load_policy(folder, rank=2)


CONFIGS: dict[str, tuple[str, dict[str, object], str]] = {
    "inpainting": ("unet/config.json", {"in_channels": 9}, "is an inpainting model"),
    "editing": ("unet/config.json", {"in_channels": 8}, "InstructPix2Pix"),
    "channels of no known kind": ("unet/config.json", {"in_channels": 12}, "takes 12 channels where its VAE gives 4"),
    "distilled": ("unet/config.json", {"time_cond_proj_dim": 256}, "distilled as an LCM"),
    "quantised": ("unet/config.json", {"quantization_config": {"load_in_4bit": True}}, "has a quantised unet"),
    "refiner": ("model_index.json", {"requires_aesthetics_score": True}, "is an SDXL refiner"),
    "controlnet": ("model_index.json", {"_class_name": "StableDiffusionXLControlNetPipeline"}, "XLControlNetPipeline"),
    "control": ("model_index.json", {"_class_name": "FluxControlPipeline"}, "FluxControlPipeline"),
    "absurd number of steps": (
        "scheduler/scheduler_config.json",
        {"num_train_timesteps": 10**18},
        "for num_train_timesteps",
    ),
}


@pytest.mark.parametrize(("file", "change", "says"), CONFIGS.values(), ids=CONFIGS)
def test_a_folder_of_another_kind_is_refused_by_its_configs(
    file: str, change: dict[str, object], says: str, tmp_path: Path
) -> None:
    folder = checkpoints.copy("sdxl", tmp_path / "model")
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
    with pytest.raises(UserError, match=says):
        load_policy(folder, rank=2)


def test_a_folder_of_pickles_is_told_to_convert_them(tmp_path: Path) -> None:
    folder = checkpoints.copy("sdxl", tmp_path / "model")
    (path,) = (folder / "vae").glob("*.safetensors")
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(UserError, match="no weights of its vae as .safetensors"):
        load_policy(folder, rank=2)
