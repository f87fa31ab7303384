"""Models that edit: the source picture reaches the network as in diffusers' own pipelines, and through a training."""

import gc
import importlib.util
import json
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import bright
import pytest
import tiny
import torch
from diffusers import Flux2KleinPipeline, FluxKontextPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from engine import quick
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.pictures import to_pil
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.seeds import noise
from dgpo_core.common.source import Source
from dgpo_core.method.rollout import rollout
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy import Cond, load_policy
from dgpo_core.policy.base import guided
from dgpo_core.policy.families import qwenedit
from dgpo_core.policy.families.flux import pack

pytestmark = pytest.mark.slow

SIZE = (tiny.SIZE, tiny.SIZE)


def picture(seed: int, height: int = tiny.SIZE, width: int = tiny.SIZE) -> Tensor:
    """[3, H, W] of whole 255ths, as a file holds them."""
    return (torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 255).round() / 255


def edit(text: str, seed: int, where: str = "") -> Prompt:
    return Prompt(text, {}, where, (Source.of_pixels(picture(seed), where),))


EDITS = [edit("a red circle", 1), edit("two blue squares", 2)]


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny.folder("kontext")


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_kontext_draws_the_picture_that_diffusers_own_pipeline_draws(folder: Path, cfg: float) -> None:
    policy = load_policy(folder, rank=2)
    solver = policy.solver("euler", 3, *SIZE)
    with policy.using(None):
        ours = rollout(policy, solver, EDITS, [[5], [6]], size=SIZE, cfg=cfg, negative_prompt="two")
    pipe = FluxKontextPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for group, prompt in zip(ours, EDITS, strict=True):
        theirs = pipe(
            image=prompt.sources[0].image()[None],
            prompt=prompt.text,
            negative_prompt="two",
            true_cfg_scale=cfg,
            height=SIZE[0],
            width=SIZE[1],
            max_area=SIZE[0] * SIZE[1],
            _auto_resize=False,
            num_inference_steps=3,
            guidance_scale=3.5,
            latents=pack(noise(group.seeds[0], policy.latent_shape(*SIZE))[None]),
            max_sequence_length=tiny.MAX_TOKENS,
            output_type="pt",
        ).images
        # the same sums; both branches of the guidance go through our network together
        assert torch.allclose(group.images, theirs, atol=2e-5)


def test_the_source_decides_what_is_drawn_and_each_group_has_its_own(folder: Path) -> None:
    policy = tiny.shared("kontext")
    solver = policy.solver("euler", 2, *SIZE)
    other = replace(EDITS[0], sources=EDITS[1].sources)
    one, two = rollout(policy, solver, [EDITS[0], other], [[5], [5]], size=SIZE)
    assert (one.images - two.images).abs().max() > 1e-3
    alone = rollout(policy, solver, [other], [[5]], size=SIZE)[0]
    assert torch.allclose(alone.images, two.images, atol=1e-5)  # a matrix product's last bits depend on its rows


def test_the_unguided_branch_sees_the_source_of_its_own_row(folder: Path) -> None:
    policy = tiny.shared("kontext")
    conds, uncond = policy.condition(EDITS, "", SIZE)
    assert len(uncond) == 2
    x, t = torch.randn(2, *policy.latent_shape(*SIZE)), torch.tensor([500.0, 500.0])
    together = guided(policy, x, t, Cond.cat(conds), uncond, 2.0)
    for i in range(2):
        row = slice(i, i + 1)
        alone = guided(policy, x[row], t[row], conds[i], uncond.select(row), 2.0)
        assert torch.allclose(together[row], alone, atol=1e-5)


@pytest.mark.parametrize("kl_cfg", [1.0, 2.0])
def test_an_editor_trains_saves_and_comes_back(folder: Path, tmp_path: Path, kl_cfg: float) -> None:
    training = {"lr": 3e-2, "clip": 1e-3, "kl_weight": 1e-2, "kl_cfg": kl_cfg}
    config = quick(rollout={"solver": "euler", "cfg": 2.0}, training=training)
    policy = load_policy(folder, rank=2, alpha=4.0, seed=1)
    trainer = Trainer(policy, EDITS, {"bright": bright.Bright()}, config, size=SIZE)
    trainer.iterate()
    assert trainer.iterate().metrics["grad_norm"] > 0
    path = tmp_path / "lora.safetensors"
    policy.save_lora(path)
    again = load_policy(folder, init_lora=path, seed=2)

    def drawn(by: object) -> Tensor:
        return rollout(by, by.solver("euler", 3, *SIZE), EDITS[:1], [[5]], size=SIZE)[0].images

    with policy.using(None):
        base = drawn(policy)
    assert (drawn(policy) - base).abs().max() > 1e-4
    # alpha / rank is multiplied into B when a file is written: one rounding of float32 apart
    assert torch.allclose(drawn(again), drawn(policy), atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_flux2_edits_as_diffusers_own_pipeline_does(count: int) -> None:
    size = (64, 64)  # of less its pipeline takes no pictures
    sources = tuple(Source.of_pixels(picture(seed, *size)) for seed in range(count))
    policy = load_policy(tiny.folder("flux2"), rank=2)
    with policy.using(None):
        ours, plain = (
            rollout(policy, policy.solver("euler", 3, *size), [Prompt("red", sources=of)], [[5]], size=size, cfg=2.0)[0]
            for of in (sources, ())
        )
    pipe = Flux2KleinPipeline.from_pretrained(tiny.folder("flux2"))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        image=[to_pil(source.image()) for source in sources],
        prompt="red",
        guidance_scale=2.0,
        height=size[0],
        width=size[1],
        num_inference_steps=3,
        max_sequence_length=pipe.tokenizer.model_max_length,
        latents=noise(5, policy.latent_shape(*size))[None],
        output_type="pt",
    ).images
    assert torch.allclose(ours.images, theirs, atol=1e-5)
    assert not torch.allclose(ours.images, plain.images, atol=1e-3)


def test_flux2_trains_on_edits() -> None:
    policy = load_policy(tiny.folder("flux2"), rank=2, alpha=4.0, seed=1)
    config = quick(rollout={"solver": "euler", "cfg": 2.0}, training={"lr": 3e-2, "kl_weight": 1e-2})
    trainer = Trainer(policy, EDITS, {"bright": bright.Bright()}, config, size=SIZE)
    assert trainer.iterate().metrics["grad_norm"] > 0


@pytest.mark.parametrize("count", [1, 2])
def test_qwen_image_edits_as_diffusers_own_pipeline_does(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, prompt = tiny.folder("qwen-image-edit"), Prompt("red", sources=tuple(e.sources[0] for e in EDITS[:count]))
    policy = load_policy(folder, rank=2)
    policy.check_sources([prompt], SIZE)
    with policy.using(None):
        (ours,) = rollout(
            policy, policy.solver("euler", 3, *SIZE), [prompt], [[5]], size=SIZE, cfg=2.0, negative_prompt="blue"
        )
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", SIZE[0] * SIZE[1])  # else about a megapixel
    pipe = QwenImageEditPlusPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    first = noise(5, policy.latent_shape(*SIZE))[None]
    theirs = pipe(
        image=[to_pil(source.image()) for source in prompt.sources],
        prompt="red",
        negative_prompt="blue",
        true_cfg_scale=2.0,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=3,
        latents=pack(first),
        output_type="pt",
    ).images
    assert torch.allclose(ours.images, theirs, atol=1e-5)


def test_the_first_qwen_image_edit_draws_what_diffusers_own_pipeline_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tiny.build("qwen-image-edit", tmp_path).components
    QwenImageEditPipeline(**parts).save_pretrained(tmp_path / "first")
    # else the pipeline scales the picture to a megapixel for both who look at it
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda *_: (*SIZE, None))
    monkeypatch.setattr(qwenedit, "_SEEN_ALONE", SIZE[0] * SIZE[1])
    policy = load_policy(tmp_path / "first", rank=2)
    with pytest.raises(UserError, match="brings 2 pictures, but a model of the family qwen-image-edit takes at most 1"):
        policy.check_sources([replace(EDITS[0], sources=EDITS[0].sources * 2)], SIZE)
    with policy.using(None):
        (ours,) = rollout(policy, policy.solver("euler", 3, *SIZE), EDITS[:1], [[5]], size=SIZE)
    pipe = QwenImageEditPipeline.from_pretrained(tmp_path / "first")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        image=to_pil(EDITS[0].sources[0].image()),
        prompt=EDITS[0].text,
        true_cfg_scale=1.0,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=3,
        latents=pack(noise(5, policy.latent_shape(*SIZE))[None]),
        output_type="pt",
    ).images
    assert torch.allclose(ours.images, theirs, atol=1e-5)


@pytest.mark.parametrize("family", ["kontext", "flux2", "qwen-image-edit"])
def test_a_process_without_groups_needs_no_picture(family: str) -> None:
    conds, uncond = tiny.shared(family).condition([], "", SIZE)
    assert conds == []
    assert len(uncond) <= 1


def test_a_package_that_is_missing_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "QwenImageEditPlusPipeline", **scheduler}))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": 1000}')
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        UserError,
        match=r"qwen-image-edit needs the package torchvision, which is not installed: run `pip install torchvision`",
    ):
        load_policy(tmp_path)


def test_qwen_image_edit_trains_and_sees_each_prompts_own_picture(tmp_path: Path) -> None:
    policy = load_policy(tiny.folder("qwen-image-edit"), rank=2, alpha=4.0, seed=1)
    first, other = policy.condition([EDITS[0], replace(EDITS[0], sources=EDITS[1].sources)], "", SIZE)[0]
    assert not torch.allclose(first.tensors["tokens"], other.tensors["tokens"])  # its text encoder looks at them
    config = quick(rollout={"solver": "euler", "cfg": 2.0}, training={"lr": 3e-2, "kl_weight": 1e-2})
    trainer = Trainer(policy, EDITS, {"bright": bright.Bright()}, config, size=SIZE)
    assert trainer.iterate().metrics["grad_norm"] > 0
    path = tmp_path / "lora.safetensors"
    policy.save_lora(path)
    load_policy(tiny.folder("qwenimage"), init_lora=path)  # the network is Qwen-Image's
    with pytest.raises(UserError, match="edits pictures, and the prompt 'red' brings none"):
        policy.check_sources([Prompt("red")], SIZE)


@pytest.mark.parametrize("stopped", [False, True])
def test_qwen_image_edit_keeps_no_picture_that_it_has_read(stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, prompt = tiny.shared("qwen-image-edit"), edit("red", 7 + stopped)
    seen = weakref.ref(prompt.sources[0].image())
    with monkeypatch.context() as patch, pytest.raises(KeyError) if stopped else nullcontext():
        if stopped:
            patch.setattr(policy, "_encode", {}.__getitem__)
        policy.condition([prompt], "", SIZE)
    del prompt
    gc.collect()
    assert seen() is None


def test_flux2_refuses_prompts_that_bring_different_numbers_of_pictures() -> None:
    policy = tiny.shared("flux2")
    policy.check_sources([Prompt("red")], SIZE)
    with pytest.raises(
        UserError, match=r"^p\.jsonl:3: the prompt 'blue' brings 0 of the pictures .* first one 1: a mod"
    ):
        policy.check_sources([edit("red", 1), Prompt("blue", {}, "p.jsonl:3")], SIZE)


def test_an_editor_refuses_a_prompt_without_a_source_and_one_with_two() -> None:
    policy = tiny.shared("kontext")
    with pytest.raises(UserError, match=r"^p\.jsonl:3: a model of the family kontext edits .*'red' brings none"):
        policy.check_sources([Prompt("red", {}, "p.jsonl:3")], SIZE)
    two = replace(edit("red", 1, "p.jsonl:3"), sources=EDITS[0].sources * 2)
    with pytest.raises(UserError, match=r"^p\.jsonl:3: .* brings 2 pictures, but .* takes at most 1"):
        policy.check_sources([two], SIZE)


def test_a_text_model_refuses_a_prompt_with_a_source() -> None:
    with pytest.raises(UserError, match=r"^p\.jsonl:3: .* brings 1 picture, but .* sd3 draws from text"):
        tiny.shared("sd3").check_sources([edit("red", 1, "p.jsonl:3")], SIZE)


def test_a_source_of_other_proportions_is_refused_and_one_of_another_size_is_scaled() -> None:
    policy = tiny.shared("kontext")
    wide = Prompt("red", {}, "p.jsonl:3", (Source.of_pixels(picture(1, 32, 64), "p.jsonl:3"),))
    with pytest.raises(UserError, match=r"^p\.jsonl:3: the source picture is 64 x 32 pixels, but .* are 32 x 32: crop"):
        policy.check_sources([wide], SIZE)
    large = Prompt("red", {}, "", (Source.of_pixels(picture(1, 64, 64)),))
    conds, _ = policy.condition([large], "", SIZE)
    assert conds[0].tensors["source"].shape == (1, *policy.latent_shape(*SIZE))
