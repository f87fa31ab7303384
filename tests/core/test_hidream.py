"""HiDream-I1: four readers of a prompt, feed-forwards of experts, and the pictures of its own pipeline."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import FlowMatchLCMScheduler, HiDreamImagePipeline, UniPCMultistepScheduler
from engine import gradient, moved
from safetensors.torch import save_file
from torch import Tensor, nn

from dgpo_core import policy as policy_package
from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.policy import FAMILIES, load_policy
from dgpo_core.policy.families.hidream import of_experts
from dgpo_core.policy.pipeline import DiffusersPolicy

pytestmark = pytest.mark.slow

LONG = "a red circle, " * 40  # more tokens than are read


def experts(policy: DiffusersPolicy) -> list[Any]:
    return [module for module in policy.network.modules() if hasattr(module, "shared_experts")]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["A red circle ", "", LONG], ids=["some", "empty", "long"])
def test_a_prompt_is_read_as_the_pipeline_reads_it(text: str) -> None:
    policy = tiny.shared("hidream")
    with torch.no_grad():
        tokens, _, layers, _, pooled, _ = policy.pipe.encode_prompt(text, do_classifier_free_guidance=False)
    (cond,) = policy.encode([text])
    assert torch.equal(cond.tensors["tokens"], tokens)
    assert torch.equal(cond.tensors["pooled"], pooled)
    # it has Llama give its attentions, too, which takes another kernel
    torch.testing.assert_close(cond.tensors["layers"].transpose(0, 1), layers, atol=1e-5, rtol=1e-5)


def test_the_published_folder_is_refused_until_what_it_lacks_is_put_there_as_its_page_says(tmp_path: Path) -> None:
    path, lacking = shutil.copytree(tiny.folder("hidream"), tmp_path / "hidream"), ("text_encoder_4", "tokenizer_4")
    index = json.loads((path / "model_index.json").read_text())
    for name in lacking:
        shutil.move(path / name, tmp_path / name)
        del index[name]
    (path / "model_index.json").write_text(json.dumps(index))
    told = r"comes without .*Llama-3.1-8B-Instruct \(text_encoder_4/\) and its tokenizer \(tokenizer_4/\): put them"
    with pytest.raises(UserError, match=told):
        load_policy(path, rank=2)
    save_file({FAMILIES["hidream"].marks[0]: torch.zeros(4, 4)}, path.with_suffix(".safetensors"))
    with pytest.raises(UserError, match=f"The folder .*{told}"):
        load_policy(path.with_suffix(".safetensors"), rank=2)
    page = Path(policy_package.__file__).with_name("README.md").read_text()
    lines = page.split("```json")[1].split("```")[0].strip().rstrip(",")
    for name in lacking:
        shutil.move(tmp_path / name, path / name)
    (path / "model_index.json").write_text(json.dumps({**index, **json.loads(f"{{{lines}}}")}))
    found, expected = (policy.encode(["red"])[0] for policy in (load_policy(path, rank=2), tiny.shared("hidream")))
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


# --- experts ---------------------------------------------------------------------------------------------------------


def test_experts_make_what_the_networks_own_forward_makes() -> None:
    policy = tiny.shared("hidream")
    ours = policy.predict(*tiny.inputs(policy)).detach()
    for layer in (plain := experts(policy)):
        del layer.forward
    try:
        theirs = policy.predict(*tiny.inputs(policy)).detach()
    finally:
        for layer in plain:
            layer.forward = of_experts.__get__(layer)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("one_sided", [False, True], ids=["some each", "none for some"])
def test_the_gradient_through_experts_is_that_of_a_network_in_training(one_sided: bool) -> None:
    layer = copy.deepcopy(experts(tiny.shared("hidream"))[0]).requires_grad_(True)
    if one_sided:  # of four experts two get all tokens
        nn.init.zeros_(layer.gate.weight)
    x = torch.randn(2, 9, 32)
    found = []
    for mode in (False, True):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        answer = type(layer).forward(layer.train(), given) if mode else of_experts(layer.eval(), given)
        answer.square().sum().backward()
        inner = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in layer.parameters()]
        found.append([answer.detach(), given.grad, *inner])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_lora_has_the_gradient_that_it_has_in_a_network_in_training() -> None:
    found = []
    for mode in (False, True):
        policy = load_policy(tiny.folder("hidream"), rank=2)
        moved(policy, "current", seed=3, size=0.1)
        for layer in experts(policy) if mode else ():
            del layer.forward
            layer.training = True
        policy.predict(*tiny.inputs(policy)).square().mean().backward()
        found.append(gradient(policy))
    assert distance(*found) < 1e-5


def test_the_gradient_is_the_same_where_the_forward_is_computed_again() -> None:
    found = []
    for again in (False, True):
        policy = load_policy(tiny.folder("hidream"), rank=2)
        moved(policy, "current", seed=3, size=0.1)
        if again:
            policy.enable_gradient_checkpointing()
        policy.predict(*tiny.inputs(policy)).square().mean().backward()
        found.append(gradient(policy))
    assert distance(*found) < 1e-5


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (64, 16), (16, 64)], ids=["square", "high", "wide"])
def test_the_picture_is_that_of_the_folders_own_pipeline(size: tuple[int, int], tmp_path: Path) -> None:
    made = tiny.build("hidream", tmp_path)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    made.scheduler = UniPCMultistepScheduler(**flow)  # Full comes with it
    made.save_pretrained(tmp_path / "model")
    policy, pipe = load_policy(tmp_path / "model", rank=2), HiDreamImagePipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    pipe.default_sample_size = math.isqrt(size[0] * size[1]) // policy._factor  # it scales all sizes to this area
    noise = torch.randn(1, *policy.latent_shape(*size), generator=torch.Generator().manual_seed(5))
    how = {"num_inference_steps": 4, "output_type": "latent", "height": size[0], "width": size[1]}
    texts = {"prompt": LONG, "negative_prompt": "Grey"}
    theirs = pipe(**texts, **how, latents=noise, guidance_scale=4.5).images
    (cond,), uncond = policy.condition([Prompt(LONG)], "Grey", size)
    ours = policy.sample(policy.solver("unipc", 4, *size), noise, cond, uncond, 4.5, lambda: None)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_its_own_size_is_the_largest_and_more_pixels_are_refused() -> None:
    policy = tiny.shared("hidream")
    assert policy.default_size == (64, 64)
    assert policy.latent_shape(128, 32) == (4, 64, 16)
    for size in ((68, 64), (128, 36)):
        with pytest.raises(UserError, match="at most as many pixels as 64 x 64, not"):
            policy.latent_shape(*size)


def test_a_distilled_one_is_drawn_with_at_its_own_levels_without_the_noise_of_its_scheduler(tmp_path: Path) -> None:
    made = tiny.build("hidream", tmp_path)
    made.scheduler = FlowMatchLCMScheduler(shift=6.0)  # as Dev has it
    made.save_pretrained(tmp_path / "model")
    policy = load_policy(tmp_path / "model", rank=2)
    solver = policy.solver("euler", 4, tiny.SIZE, tiny.SIZE)
    scheduler = FlowMatchLCMScheduler(shift=6.0)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(solver.timesteps, scheduler.timesteps.float())
    (cond,) = policy.encode(["a red circle"])
    noise = torch.randn(1, *policy.latent_shape(tiny.SIZE, tiny.SIZE))
    drawn = [policy.sample(solver, noise, cond, cond, 1.0, lambda: None) for _ in range(2)]
    assert torch.equal(*drawn)


# --- the LoRA --------------------------------------------------------------------------------------------------------


def test_the_lora_is_on_the_projections_of_both_streams_and_on_no_expert() -> None:
    layers = {name.split(".lora_")[0] for name in tiny.shared("hidream").trainable()}
    ways = [f"to_{way}{stream}" for way in ("q", "k", "v", "out") for stream in ("", "_t")]
    wanted = {f"double_stream_blocks.{i}.block.attn1.{way}" for i in range(2) for way in ways}
    wanted |= {f"single_stream_blocks.{i}.block.attn1.{way}" for i in range(2) for way in ways if way[-2:] != "_t"}
    assert layers == wanted
