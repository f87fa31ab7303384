"""The LoRA file: diffusers loads all of it, it draws the same, it can be continued from, and bad ones are told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.policy import Cond, load_policy
from dgpo_core.policy.lora import file as lora_file
from dgpo_core.policy.pipeline import DiffusersPolicy

pytestmark = pytest.mark.slow

FAMILIES = list(tiny.BUILDERS)


def shake(policy: DiffusersPolicy, name: str = "current") -> None:
    """Gives one adapter weights as if it had been trained."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.adapter_state(name).values():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)


def inputs(policy: DiffusersPolicy) -> tuple[Tensor, Tensor, Cond]:
    x = torch.randn(2, *policy.latent_shape(tiny.SIZE, tiny.SIZE), generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([900.0, 300.0]), Cond.cat(policy.encode(["a red circle", "a blue square"]))


def reload(family: str, folder: Path, lora: Path) -> Any:
    """A fresh diffusers pipeline with the LoRA in it."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.load_lora_weights(str(lora))
    return pipe


@torch.no_grad()
def predict_with(network: Any, policy: DiffusersPolicy, *args: Any) -> Tensor:
    """The policy's prediction through another network of the same family."""
    own, policy.network = policy.network, network
    try:
        return policy.predict(*args)
    finally:
        policy.network = own


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_every_key_and_predicts_what_the_trained_model_predicts(family: str, tmp_path: Path) -> None:
    folder = tiny.folder(family)
    policy = load_policy(folder, rank=3, alpha=7.0)
    shake(policy)
    path = tmp_path / "lora.safetensors"
    policy.save_lora(path)
    pipe = reload(family, folder, path)
    network = getattr(pipe, policy.network_name)

    saved = load_file(path)
    if family == "wan":  # the file has its makers' names
        assert all(key.startswith("diffusion_model.blocks.") for key in saved)
        saved = pipe.lora_state_dict(saved)
    loaded = get_peft_model_state_dict(network, adapter_name="default_0")
    assert {f"{policy.network_name}.{key}" for key in loaded} == set(saved)  # none missing, none unexpected
    for key, value in loaded.items():
        assert torch.equal(value, saved[f"{policy.network_name}.{key}"])

    args = inputs(policy)
    with torch.no_grad():
        trained = policy.predict(*args)
        with policy.using(None):
            base = policy.predict(*args)
    # the scale 7/3 is in B: one rounding of float32 (6e-8) per weight, and sums in another order
    torch.testing.assert_close(predict_with(network, policy, *args), trained, atol=1e-5, rtol=1e-5)
    assert (trained - base).abs().max() > 0.02


def test_the_reloaded_pipeline_draws_the_trained_image(tmp_path: Path) -> None:
    policy = load_policy(tiny.folder("sd3"), rank=4, alpha=8.0)
    shake(policy)
    policy.save_lora(tmp_path / "lora.safetensors")
    x, _, cond = inputs(policy)
    ours = policy.decode(
        policy.solver("euler", 4, tiny.SIZE, tiny.SIZE).sample(lambda x, t: policy.predict(x, t, cond), x)
    )
    pipe = reload("sd3", tiny.folder("sd3"), tmp_path / "lora.safetensors")
    pipe.set_progress_bar_config(disable=True)
    tensors = cond.tensors
    theirs = pipe(
        prompt_embeds=tensors["tokens"], pooled_prompt_embeds=tensors["pooled"], latents=x, guidance_scale=1.0,
        num_inference_steps=4, height=tiny.SIZE, width=tiny.SIZE, output_type="pt",
    ).images  # fmt: skip
    # weights at other addresses: matrix products may add in another order, float32's 1e-7 grown by four steps
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("rank", "alpha", "exact"), [(4, 8.0, True), (8, 4.0, True), (4, 4.0, True), (3, 7.0, False)])
def test_rank_and_alpha_come_back(rank: int, alpha: float, exact: bool, tmp_path: Path) -> None:
    policy = load_policy(tiny.folder("sd3"), rank=rank, alpha=alpha)
    shake(policy)
    policy.save_lora(tmp_path / "lora.safetensors")
    again = load_policy(tiny.folder("sd3"), rank=rank, alpha=alpha, init_lora=tmp_path / "lora.safetensors")
    for key, value in policy.adapter_state("current").items():
        back = again.adapter_state("current")[key]
        assert torch.equal(value, back) if exact else torch.allclose(value, back, rtol=3e-7, atol=0)


def test_all_three_adapters_start_from_the_file_and_the_reference_does_not(tmp_path: Path) -> None:
    policy = load_policy(tiny.folder("sd15"), rank=2, alpha=2.0)
    shake(policy, "ema")
    policy.save_lora(tmp_path / "ema.safetensors", name="ema")
    args = inputs(policy)
    again = load_policy(tiny.folder("sd15"), init_lora=tmp_path / "ema.safetensors")
    assert (again.adapters.rank, again.adapters.alpha) == (2, 2)  # the file's, at scale 1
    with torch.no_grad():
        for name in ("current", "old", "ema"):
            with policy.using("ema"), again.using(name):
                assert torch.equal(policy.predict(*args), again.predict(*args))
        with policy.using(None), again.using(None):
            assert torch.equal(policy.predict(*args), again.predict(*args))


def test_a_smaller_lora_is_filled_up_to_the_rank_and_can_learn_there(tmp_path: Path) -> None:
    small = load_policy(tiny.folder("sd3"), rank=2, alpha=2.0)
    shake(small)
    small.save_lora(tmp_path / "lora.safetensors")
    big = load_policy(tiny.folder("sd3"), rank=5, alpha=20.0, init_lora=tmp_path / "lora.safetensors")
    args = inputs(small)
    torch.testing.assert_close(big.predict(*args), small.predict(*args), atol=1e-5, rtol=1e-5)
    big.predict(*args).sum().backward()
    b = big.trainable()["transformer_blocks.0.attn.to_q.lora_B.weight"]
    assert b.grad is not None
    assert b.grad[:, 2:].abs().max() > 0


def test_diffusers_own_files_are_read_with_their_alpha(tmp_path: Path) -> None:
    policy = load_policy(tiny.folder("sd3"), rank=2, alpha=6.0)
    shake(policy)
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=policy.adapter_state("current"),
        transformer_lora_adapter_metadata={"r": 2, "lora_alpha": 6},
    )
    again = load_policy(tiny.folder("sd3"), init_lora=tmp_path / "pytorch_lora_weights.safetensors")
    args = inputs(policy)
    torch.testing.assert_close(again.predict(*args), policy.predict(*args), atol=1e-5, rtol=1e-5)


def test_the_targets_are_those_asked_for_and_a_files_when_none_are(tmp_path: Path) -> None:
    policy = load_policy(tiny.folder("sd3"), rank=2, targets=["ff.net.2"])
    assert {key.split(".lora_")[0] for key in policy.trainable()} == {
        f"transformer_blocks.{i}.ff.net.2" for i in (0, 1)
    }
    shake(policy)
    policy.save_lora(tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="add it to the LoRA targets"):
        load_policy(tiny.folder("sd3"), rank=2, targets=["to_q"], init_lora=tmp_path / "lora.safetensors")
    again = load_policy(tiny.folder("sd3"), init_lora=tmp_path / "lora.safetensors")
    assert set(policy.trainable()) < set(again.trainable())


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    policy = load_policy(tiny.folder("sd3"), rank=2)
    metadata = {f"dgpo.{i}": str(i) for i in range(20)}
    for name in ("a", "b"):
        policy.save_lora(
            tmp_path / f"{name}.safetensors", metadata=dict(reversed(metadata.items())) if name == "b" else metadata
        )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_metadata_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    policy = load_policy(tiny.folder("sdxl"), rank=2, alpha=8.0)
    policy.save_lora(path, {"modelspec.title": "Cats", "dgpo.step": "7"})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "Cats",
        "modelspec.prediction_type": "epsilon",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",  # of the file: the scale is in the weights
        "dgpo.lora_alpha": "8.0",
        "dgpo.step": "7",
    }
    assert expected.items() <= metadata.items()
    assert not any("date" in key for key in metadata)
    assert lora_file.read(path).rank == 2


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(tiny.folder("sd3"), rank=2)
    path = tmp_path / "lora.safetensors"
    policy.save_lora(path)
    before = path.read_bytes()
    shake(policy)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left"):
        policy.save_lora(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _write(path: Path, **tensors: Tensor) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def test_files_that_are_no_lora_of_this_model_are_told(tmp_path: Path) -> None:
    policy = load_policy(tiny.folder("sd3"), rank=2)
    key = "transformer.transformer_blocks.0.attn.to_q"
    broken, pickle = tmp_path / "broken.safetensors", tmp_path / "lora.pt"
    broken.write_bytes(b"not safetensors at all")
    torch.save({}, pickle)
    other = load_policy(tiny.folder("sdxl"), rank=2)
    other.save_lora(tmp_path / "sdxl.safetensors")
    flux = load_policy(tiny.folder("flux"), rank=2, targets=["x_embedder"])
    flux.save_lora(tmp_path / "flux.safetensors")
    policy_big = load_policy(tiny.folder("sd3"), rank=4)
    policy_big.save_lora(tmp_path / "big.safetensors")
    a, b = torch.zeros(2, 16), torch.zeros(16, 2)
    cases: list[tuple[Path, str]] = [
        (tmp_path / "absent.safetensors", "There is no LoRA file"),
        (broken, "not a readable .safetensors file"),
        (pickle, "not a readable .safetensors file"),
        (tmp_path / "sdxl.safetensors", "for another model"),
        (tmp_path / "flux.safetensors", "for another model"),
        (tmp_path / "big.safetensors", "has rank 4: set the rank to at least that"),
        (_write(tmp_path / "1.safetensors", weight=a), "is no LoRA in any known format"),
        (_write(tmp_path / "2.safetensors", **{f"{key}.lora_A.weight": a}), "incomplete"),
        (
            _write(tmp_path / "3.safetensors", **{f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b[:, :1]}),
            "incomplete",
        ),
        (
            _write(tmp_path / "4.safetensors", **{f"{key}.lora_A.weight": a[:, :8], f"{key}.lora_B.weight": b}),
            "does not fit",
        ),
        (_write(tmp_path / "5.safetensors", **{"lora_te_x.lora_down.weight": a}), "text encoder"),
        (_write(tmp_path / "6.safetensors", **{"text_encoder.x.lora_A.weight": a}), "text encoder"),
        (_write(tmp_path / "7.safetensors"), "has no tensors in it"),
    ]
    before = {k: v.clone() for k, v in policy.adapter_state("current").items()}
    for path, says in cases:
        with pytest.raises(UserError, match=says):
            policy.load_lora(path)
    for k, v in policy.adapter_state("current").items():
        assert torch.equal(v, before[k])  # nothing is half loaded


def test_alpha_keys_are_honoured(tmp_path: Path) -> None:
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    a, b = torch.ones(2, 16), torch.ones(16, 2)
    path = _write(
        tmp_path / "x.safetensors",
        **{f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.alpha": torch.tensor(6.0)},
    )
    assert torch.equal(lora_file.read(path).weights[key][1], b * 3)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_unet_file_under_comfyuis_names_is_the_same_lora_to_diffusers_and_to_us(family: str, tmp_path: Path) -> None:
    folder = tiny.folder(family)
    policy = load_policy(folder, rank=3, alpha=7.0)
    shake(policy)
    renamed = lora_file.for_comfyui(policy.lora_tensors())
    lora_file.write(tmp_path / "comfyui.safetensors", renamed, policy.lora_metadata({}))
    assert all(key.startswith("lora_unet_") for key in renamed)
    args = inputs(policy)
    with torch.no_grad():
        expected = policy.predict(*args)
    pipe = reload(family, folder, tmp_path / "comfyui.safetensors")
    again = load_policy(folder, init_lora=tmp_path / "comfyui.safetensors")
    with torch.no_grad():
        theirs, ours = predict_with(pipe.unet, policy, *args), again.predict(*args)
    assert torch.allclose(theirs, expected, atol=1e-5)  # alpha / rank is no power of two: one rounding
    assert torch.allclose(ours, expected, atol=1e-5)
