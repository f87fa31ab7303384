"""Wan: films of one frame, the pictures of its own pipeline, and a LoRA under the names that all loaders know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_films
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from engine import moved
from safetensors import safe_open

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.policy import load_policy
from dgpo_core.policy.loading.folder import open_configs

pytestmark = pytest.mark.slow

LONG = "a red circle, " * 200  # more tokens than are read
KINDS = pytest.mark.parametrize("build", [tiny_films.wan, tiny_films.wan22], ids=["2.1", "2.2 5B"])


@pytest.mark.parametrize("text", ["A  red &amp; round circle ", "", LONG], ids=["some", "empty", "long"])
def test_a_prompt_is_read_as_the_pipelines_call_reads_it(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny.shared("wan")
    found: list[Any] = []
    encode = policy.pipe.encode_prompt
    monkeypatch.setattr(policy.pipe, "encode_prompt", lambda *a, **k: found.append(encode(*a, **k)) or found[0])
    size = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": 1}
    policy.pipe(prompt=text, **size, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    monkeypatch.undo()
    (cond,) = policy.encode([text])
    assert cond.tensors["tokens"].shape == (1, 512, 32)
    assert torch.equal(cond.tensors["tokens"], found[0][0])


@KINDS
def test_the_picture_is_that_of_the_folders_own_pipeline(build: Callable[..., WanPipeline], tmp_path: Path) -> None:
    made, size = build(tmp_path), (64, 32)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    made.scheduler = UniPCMultistepScheduler(**flow)  # the published ones come with it
    made.save_pretrained(tmp_path / "model")
    policy, pipe = load_policy(tmp_path / "model", rank=2), WanPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *policy.latent_shape(*size), generator=torch.Generator().manual_seed(5))
    how = {"num_inference_steps": 4, "output_type": "pt", "height": size[0], "width": size[1], "num_frames": 1}
    texts = {"prompt": LONG, "negative_prompt": "Grey"}
    theirs = pipe(**texts, **how, latents=noise.unsqueeze(2), guidance_scale=4.5).frames[:, 0]
    (cond,), uncond = policy.condition([Prompt(LONG)], "Grey", size)
    ours = policy.decode(policy.sample(policy.solver("unipc", 4, *size), noise, cond, uncond, 4.5, lambda: None))
    assert ours.shape == (1, 3, *size)
    # the 5B's pipeline tells the network the time patch by patch: other sums of the same numbers
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@KINDS
def test_a_picture_comes_back_from_its_latents_size(build: Callable[..., WanPipeline], tmp_path: Path) -> None:
    build(tmp_path).save_pretrained(tmp_path / "model")
    policy = load_policy(tmp_path / "model", rank=2)
    images = torch.rand(2, 3, 32, 16, generator=torch.Generator().manual_seed(1))
    latents = policy.encode_images(images)
    assert tuple(latents.shape[1:]) == policy.latent_shape(32, 16)
    assert policy.decode(latents).shape == images.shape
    unit = policy._factor * 2
    with pytest.raises(UserError, match=f"multiples of {unit}, not 32 x {unit + 2}"):
        policy.latent_shape(32, unit + 2)


@KINDS
def test_a_film_of_one_frame_is_as_large_as_its_makers_films(build: Callable[..., WanPipeline], tmp_path: Path) -> None:
    build(tmp_path).save_pretrained(tmp_path / "model")
    policy = load_policy(tmp_path / "model", rank=2)
    policy._factor *= 4  # the published VAEs halve three times, and 16 pixels are a place of the 5B's latent
    assert policy.default_size == ((480, 832) if build is tiny_films.wan else (704, 1280))


def test_the_parts_that_its_class_keeps_in_float32_stay_so_and_are_counted_so() -> None:
    policy = load_policy(tiny.folder("wan"), rank=2, dtype="bf16")
    pipe = WanPipeline.from_pretrained(tiny.folder("wan"), torch_dtype=torch.bfloat16)
    theirs = {name: tensor.dtype for name, tensor in pipe.transformer.named_parameters()}
    ours = {name.replace(".base_layer", ""): p.dtype for name, p in policy.network.named_parameters()}
    assert {name: ours[name] for name in theirs} == theirs
    _, weightless = open_configs(str(tiny.folder("wan")), None, torch.bfloat16, "auto")
    for part in ("transformer", "vae", "text_encoder"):
        loaded, counted = (
            {name: tensor.dtype for name, tensor in getattr(made, part).named_parameters()}
            for made in (pipe, weightless)
        )
        assert counted == loaded
    assert set(theirs.values()) == {torch.float32, torch.bfloat16}


def test_the_lora_has_its_makers_names_and_comes_back(tmp_path: Path) -> None:
    targets = ["to_q", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "time_proj", "proj_out"]
    policy = load_policy(tiny.folder("wan"), rank=2, alpha=4.0, targets=targets)
    moved(policy, "current", seed=3, size=0.1)
    path = tmp_path / "lora.safetensors"
    policy.save_lora(path)
    with safe_open(path, framework="pt") as file:
        names = {key.rpartition(".lora_")[0] for key in file.keys()}  # noqa: SIM118 - no mapping
    blocks = {f"blocks.{i}.{part}" for i in range(2) for part in
              ("self_attn.q", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")}  # fmt: skip
    assert names == {f"diffusion_model.{name}" for name in (*blocks, "time_projection.1", "head.head")}
    again = load_policy(tiny.folder("wan"), rank=2, alpha=4.0, targets=targets, init_lora=path)
    for key, tensor in policy.adapter_state("current").items():
        assert torch.equal(again.adapter_state("current")[key], tensor)
    WanPipeline.from_pretrained(tiny.folder("wan")).load_lora_weights(str(path))  # raises for a key left over


@pytest.mark.parametrize(
    ("index", "told"),
    [
        (
            {"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]},
            "is of Wan 2.2 A14B, whose two networks take turns .*: take Wan 2.1 T2V or Wan 2.2 TI2V-5B",
        ),
        ({"_class_name": "WanImageToVideoPipeline"}, "is a Wan that is shown a picture.*: take Wan 2.1 T2V"),
        ({"_class_name": "WanVACEPipeline"}, "is a Wan that is shown a picture.*: take Wan 2.1 T2V"),
    ],
    ids=["A14B", "I2V", "VACE"],
)
def test_other_wans_are_refused_by_what_they_are(index: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=told):
        load_policy(tmp_path, rank=2)


def test_a_network_that_takes_more_than_its_vae_gives_is_refused(tmp_path: Path) -> None:
    path = shutil.copytree(tiny.folder("wan"), tmp_path / "model") / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "in_channels": 12}))  # as Fun Control has three times
    with pytest.raises(UserError, match="takes 12 channels where its VAE gives 4"):
        load_policy(tmp_path / "model", rank=2)
