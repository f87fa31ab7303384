"""Sana: prompts below an instruction, negative prompts without it, and the pictures of its own pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from engine import PROMPTS, quick

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.method.rollout import rollout
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy import load_policy

pytestmark = pytest.mark.slow

SIZE = (tiny.SIZE, tiny.SIZE)
LONG = "a red circle, " * 40  # more than 300 tokens


def own(call: Callable[..., Any], **changes: Any) -> Any:
    """The pipeline's own call, at the tiny size."""
    return call(height=tiny.SIZE, width=tiny.SIZE, use_resolution_binning=False, **changes)


@pytest.mark.parametrize("text", ["A red circle ", "", LONG], ids=["some", "empty", "long"])
def test_a_prompt_is_read_as_the_pipeline_reads_it(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny.shared("sana")
    found: list[Any] = []
    encode = policy.pipe.encode_prompt
    monkeypatch.setattr(policy.pipe, "encode_prompt", lambda *a, **k: found.append(encode(*a, **k)) or found[0])
    own(policy.pipe, prompt="a blue square", negative_prompt=text, num_inference_steps=1, output_type="latent")
    monkeypatch.undo()
    (cond,), uncond = policy.condition([Prompt("a blue square")], text, SIZE)
    tokens, mask, negative, negative_mask = found[0]
    for ours, theirs, count in ((cond, tokens, mask), (uncond, negative, negative_mask)):
        # the same causal layers over fewer tokens: float32's rounding
        torch.testing.assert_close(ours.tensors["tokens"], theirs[count.bool()][None], atol=1e-5, rtol=1e-5)


def test_a_negative_prompt_is_not_read_as_a_prompt() -> None:
    policy = tiny.shared("sana")
    (cond,), uncond = policy.condition([Prompt("a red circle")], "a red circle", SIZE)
    assert not torch.equal(cond.tensors["tokens"][:, -1], uncond.tensors["tokens"][:, -1])


@pytest.mark.parametrize("norm", [None, "rms_norm_across_heads"], ids=["1.0", "1.5"])
def test_the_picture_is_that_of_the_folders_own_pipeline(norm: str | None, tmp_path: Path) -> None:
    made = tiny.build("sana", tmp_path)
    made.transformer = SanaTransformer2DModel.from_config(made.transformer.config, qk_norm=norm)
    made.save_pretrained(tmp_path / "model")
    policy, pipe = load_policy(tmp_path / "model", rank=2), SanaPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *policy.latent_shape(*SIZE), generator=torch.Generator().manual_seed(5))
    texts, how = {"prompt": LONG, "negative_prompt": "Grey"}, {"num_inference_steps": 4, "output_type": "latent"}
    theirs = own(pipe, **texts, **how, latents=noise, guidance_scale=4.5).images
    (cond,), uncond = policy.condition([Prompt(LONG)], "Grey", SIZE)
    solver = policy.solver("dpmpp_2m", 4, *SIZE)  # the scheduler that Sana comes with
    ours = policy.sample(solver, noise, cond, uncond, 4.5, lambda: None)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_negative_prompt_is_read_ahead_as_such(tmp_path: Path) -> None:
    policy = load_policy(tiny.folder("sana"), rank=2, prompt_cache=tmp_path)
    config = quick(rollout={"cfg": 2.0, "negative_prompt": "grey"})
    trainer = Trainer(policy, PROMPTS, {}, config, size=SIZE)
    policy.read_ahead(trainer.texts(), lambda: None)
    assert not policy._text_encoders()
    rollout(policy, policy.solver("euler", 2, *SIZE), PROMPTS[:1], [[5]], size=SIZE, cfg=2.0, negative_prompt="grey")
    assert not policy._text_encoders()


def test_sprint_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaSprintPipeline"}))
    with pytest.raises(UserError, match="is Sana Sprint, a trigflow model.*: take Sana"):
        load_policy(tmp_path, rank=2)


def test_float16_is_refused_before_it_overflows() -> None:
    with pytest.raises(UserError, match="float16.*: set model.dtype to bfloat16"):
        load_policy(tiny.folder("sana"), rank=2, dtype="fp16")
