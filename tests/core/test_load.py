"""Loading: folders, single checkpoints, families read from the model, and what a bad model gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import makers_layout
import pytest
import single_file
import tiny
import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.policy import FAMILIES, Cond, load_policy
from dgpo_core.policy.pipeline import DiffusersPolicy

PROMPTS = ["a red circle", "two blue squares"]


def inputs(policy: DiffusersPolicy) -> tuple[Tensor, Tensor, Cond]:
    x = torch.randn(2, *policy.latent_shape(tiny.SIZE, tiny.SIZE), generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([900.0, 300.0]), Cond.cat(policy.encode(PROMPTS))


@pytest.mark.slow
def test_a_single_checkpoint_is_the_same_model_as_its_folder(tmp_path: Path) -> None:
    folder = tiny.folder("sd15")
    path = single_file.write(tiny.sd15(tmp_path), tmp_path / "model.safetensors")
    expected = load_policy(folder, rank=2)
    args = inputs(expected)
    config = _configs_of(folder, tmp_path / "configs")
    found = load_policy(path, rank=2, config=config)
    assert found.family == "sd15"
    with torch.no_grad():
        assert torch.equal(found.predict(*inputs(found)), expected.predict(*args))
        assert torch.equal(found.decode(args[0]), expected.decode(args[0]))
    config.rename(tmp_path / "model")  # beside the checkpoint it is found by itself
    assert load_policy(path, rank=2).family == "sd15"


def _configs_of(folder: Path, to: Path) -> Path:
    """The configs and tokenizers of a model folder without its weights."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    return to


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_read_from_the_model(family: str) -> None:
    assert tiny.shared(family).family == family
    other = next(f for f in FAMILIES if f != family)
    with pytest.raises(UserError, match=f"is of family {family}, not {other}"):
        load_policy(tiny.folder(family), rank=2, family=other)


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "sd15"),
        ("model.diffusion_model.label_emb.0.0.weight", "sdxl"),
        ("model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias", "sd3"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "flux"),
        ("cap_pad_token", "zimage"),
        ("transformer_blocks.0.img_mod.1.weight", "qwenimage"),
        ("double_stream_modulation_img.lin.weight", "flux2"),
        ("distilled_guidance_layer.norms.0.scale", "chroma"),
        ("double_stream_blocks.0.block.adaLN_modulation.1.bias", "hidream"),
        ("head.modulation", "wan"),
    ],
)
def test_a_checkpoint_without_configs_is_told_where_to_put_them(
    key: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from safetensors.torch import save_file

    from dgpo_core.policy.loading.header import read_header
    from dgpo_core.policy.loading.recognise import recognise

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    path = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(4, 4)}, path)
    assert recognise(read_header(path)) == family
    with pytest.raises(UserError, match="put (a|the) diffusers folder"):
        load_policy(path, rank=2)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", makers_layout.FAMILIES)
def test_a_network_in_its_makers_layout_is_the_same_model_as_its_folder(
    family: str, prefix: str, tmp_path: Path
) -> None:
    path = makers_layout.write(family, tiny.BUILDERS[family](tmp_path), tmp_path / "model.safetensors", prefix)
    policy, whole = load_policy(path, rank=2), tiny.shared(family)
    assert policy.family == family
    with torch.no_grad():
        assert torch.equal(policy.predict(*inputs(policy)), whole.predict(*inputs(whole)))


@pytest.mark.slow
def test_a_chroma_in_its_makers_layout_is_converted_to_the_whole_of_its_network() -> None:
    from diffusers import ChromaTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers as convert

    with torch.device("meta"):  # of the published width, which diffusers takes for granted, and of two short stacks
        state = ChromaTransformer2DModel(num_layers=1, num_single_layers=1).state_dict()
    found = convert(makers_layout.named("chroma", state))
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize("family", makers_layout.FAMILIES)
def test_a_network_alone_names_the_folder_that_has_the_rest(family: str, tmp_path: Path) -> None:
    path = makers_layout.write(family, tiny.BUILDERS[family](tmp_path), tmp_path / "model.safetensors")
    shutil.rmtree(path.with_suffix(""))
    with pytest.raises(UserError, match="is the network alone") as caught:
        load_policy(path, rank=2)
    told = str(caught.value)
    assert FAMILIES[family].example in told
    assert str(path.with_suffix("")) in told
    assert "\n" not in told


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_model_of_the_hubs_cache_is_looked_into_like_a_folder(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--owner--model"
    snapshot = checkpoints.copy("sdxl", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    for path in snapshot.rglob("*.safetensors"):
        path.rename(path.with_suffix(f"{variant}.safetensors"))
    policy = load_policy("owner/model", rank=2)
    with torch.no_grad():
        assert torch.equal(policy.predict(*inputs(policy)), tiny.shared("sdxl").predict(*inputs(tiny.shared("sdxl"))))
    config = snapshot / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "EDMEulerScheduler"}))
    with pytest.raises(UserError, match="predicts EDM"):
        load_policy("owner/model", rank=2)


def test_models_that_cannot_be_loaded_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from safetensors.torch import save_file

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    empty, foreign, corrupt = tmp_path / "empty", tmp_path / "foreign", tmp_path / "corrupt"
    empty.mkdir()
    foreign.mkdir()
    (foreign / "model_index.json").write_text(json.dumps({"_class_name": "AudioLDMPipeline"}))
    shutil.copytree(tiny.folder("sd3"), corrupt)
    weights = corrupt / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    halved = tmp_path / "halved"
    shutil.copytree(tiny.folder("sd3"), halved)
    shutil.rmtree(halved / "vae")
    for name in ("model.ckpt", "model.pt", "broken.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"0123456789")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "absent", {}, "There is no model"),
        (empty, {}, "no model_index.json"),
        (foreign, {}, "AudioLDMPipeline"),
        (corrupt, {}, "it ends within its header"),
        (halved, {}, "has no weights of its vae"),
        (tmp_path / "model.ckpt", {}, "only those are loaded"),
        (tmp_path / "model.pt", {}, "only those are loaded"),
        (tmp_path / "notes.txt", {}, "only those are loaded"),
        (tmp_path / "broken.safetensors", {}, "not a readable"),
        (tmp_path / "other.safetensors", {}, "none of|not a checkpoint of any"),
        ("nobody/nothing-here", {}, "cannot be loaded"),
        (tiny.folder("sd3"), {"family": "sd4"}, "Unknown model family 'sd4'"),
        (tiny.folder("sd3"), {"dtype": "int3"}, "Unknown number type"),
        (tiny.folder("sd3"), {"device": "warp"}, "The device warp"),
        (tiny.folder("sd3"), {"init_lora": tmp_path / "no.safetensors"}, "There is no LoRA file"),
    ]
    for path, options, says in cases:
        with pytest.raises(UserError, match=says) as caught:
            load_policy(path, **{"rank": 2, **options})
        assert "\n" not in str(caught.value)
