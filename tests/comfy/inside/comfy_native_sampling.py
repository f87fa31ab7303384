"""Run by `test_native_sampling.py` in ComfyUI's folder and interpreter: prints what roll-outs drew, as JSON.

The judge is ComfyUI's own KSampler node, followed by its VAE Decode, with the same seed, texts and settings.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

# isort: split
from comfy_native_case import Case, randomise
from comfy_native_models import SIDE

# isort: split
import comfy.model_sampling
import comfy.samplers
import comfy.sd
import comfy_lora
import torch
from comfy_lora import difference
from torch import Tensor

import nodes  # ComfyUI's own
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.seeds import noise
from dgpo_core.diffusion.solvers import make_solver
from dgpo_core.method.rollout import nothing, rollout
from dgpo_core.policy import guided

native_sampling = importlib.import_module("pack.on_model.sampling")
sampling = importlib.import_module("pack.sampling")
FAMILIES = os.environ.get("FAMILIES", "sd15 sdxl sd3 flux qwen lumina hidream wan").split()
SIZE = (8 * SIDE, 8 * SIDE)
SEEDS = {"red": [3, 2**40], "blue": [5]}
NEGATIVE = "grey"
ENGINES = {"sd15": ("dpmpp_2m",), "sd3": ("euler", "heun")}
"""Solvers that are the same algorithm in ComfyUI and in diffusers, where diffusers does not round the levels."""


def drawn(policy: Any, name: str, scheduler: str, cfg: float = 4.0, check: Callable = nothing) -> list[Group]:
    """Groups of SEEDS in 3 steps."""
    solver = policy.solver(name, 3, *SIZE, scheduler=scheduler)
    prompts = [Prompt(text) for text in SEEDS]
    return rollout(
        policy, solver, prompts, list(SEEDS.values()), size=SIZE, cfg=cfg, negative_prompt=NEGATIVE, check=check
    )


@torch.inference_mode()
def ksampler(case: Case, model: Any, name: str, scheduler: str, cfg: float = 4.0) -> list[Tensor]:
    """The latents [1, C, h, w] that KSampler gives out for each of SEEDS."""
    negative = case.clip.encode_from_tokens_scheduled(NEGATIVE)
    latents = []
    for text, seeds in SEEDS.items():
        positive = case.clip.encode_from_tokens_scheduled(text)
        for seed in seeds:
            (empty,) = nodes.EmptyLatentImage().generate(SIZE[1], SIZE[0])
            settings = (seed, 3, cfg, name, scheduler, positive, negative, empty)
            latents.append(nodes.KSampler().sample(model, *settings, denoise=1.0)[0]["samples"])
    return latents


def same(case: Case, groups: Sequence[Group], latents: Sequence[Tensor]) -> bool:
    """Whether roll-outs are what KSampler drew, in every bit of the latents."""
    ours = case.native.model.process_latent_out(torch.cat([group.latents for group in groups]))
    return bool(torch.equal(ours, torch.cat(list(latents))))


def alike(case: Case, policy: Any, model: Any, name: str, scheduler: str) -> list[bool]:
    """The latents and the pictures against KSampler's and VAE Decode's, without guidance and with it."""
    found = []
    for cfg in (1.0, 4.0):
        groups, latents = drawn(policy, name, scheduler, cfg), ksampler(case, model, name, scheduler, cfg)
        with torch.inference_mode():
            pictures = [nodes.VAEDecode().decode(case.vae, {"samples": latent})[0] for latent in latents]
        images = torch.cat([group.images for group in groups])
        found += [same(case, groups, latents), bool(torch.equal(images, torch.cat(pictures).movedim(-1, 1)))]
    return found


def each(case: Case, policy: Any, settings: Sequence[tuple[str, str]]) -> dict[str, bool]:
    """By sampler and scheduler, whether the latents are KSampler's."""
    return {
        f"{name} {scheduler}": same(case, drawn(policy, name, scheduler), ksampler(case, case.model, name, scheduler))
        for name, scheduler in settings
    }


def patched(case: Case) -> Any:
    """The MODEL with a LoRA, another noise schedule, a model wrapper and a CFG of another kind on it."""
    policy = case.policy()
    randomise(policy)
    model = comfy.sd.load_lora_for_models(case.model, None, policy.lora_tensors(), 1.0, 0)[0]
    sampling_type = type(model.get_model_object("model_sampling"))
    if policy.prediction.name == "flow":
        shifted = sampling_type(case.native.model.model_config)
        shifted.set_parameters(shift=1.5)
        model.add_object_patch("model_sampling", shifted)
    model.set_model_unet_function_wrapper(lambda f, given: 0.9 * f(given["input"], given["timestep"], **given["c"]))
    model.set_model_sampler_cfg_function(lambda given: given["uncond"] + 0.7 * (given["cond"] - given["uncond"]))
    return model


def levels(policy: Any) -> dict[str, Any]:
    """Training timesteps of every scheduler, back as ComfyUI's sigmas, against the sigmas that the sampler goes by."""
    found = {}
    for scheduler in ("", *comfy.samplers.KSampler.SCHEDULERS):
        solver = policy.solver("euler", 4, *SIZE, scheduler=scheduler)
        sigmas = native_sampling._levels(policy.prediction, solver.timesteps)
        found[scheduler] = float((sigmas.log() - solver.sigmas[:-1].log()).abs().max())
    return found


def engines(policy: Any, name: str) -> float:
    """How far a roll-out on the engine's own levels is from what the engine's solver makes of the same predictions."""
    x_T = torch.stack([noise(seed, policy.latent_shape(*SIZE)) for seed in SEEDS["red"]])
    cond, uncond = policy.encode(["red"])[0].expand(2), policy.encode([NEGATIVE])[0]
    ours = policy.sample(policy.solver(name, 5, *SIZE), x_T, cond, uncond, 4.0, nothing)
    solver = make_solver(name, policy.scheduler_config, policy.prediction, 5)
    with torch.no_grad():
        theirs = solver.sample(lambda x, t: guided(policy, x, t, cond, uncond, 4.0), x_T)
    return difference(ours, theirs)


def adapters(case: Case, policy: Any) -> dict[str, float]:
    """The active adapter draws: the trained one as its saved LoRA on the MODEL does."""
    randomise(policy)
    latents = {}
    for name in (None, "old", "current"):
        with policy.using(name):
            latents[name] = torch.cat([group.latents for group in drawn(policy, "euler", "normal")])
    policy.to("cpu")
    loaded = comfy.sd.load_lora_for_models(case.model, None, policy.lora_tensors(), 1.0, 0)[0]
    theirs = case.native.model.process_latent_in(torch.cat(ksampler(case, loaded, "euler", "normal")))
    return {
        "old": difference(latents["old"], latents[None]),  # still fresh: it does nothing
        "current": difference(latents["current"], latents[None]),
        "loaded": difference(latents["current"], theirs),
    }


def stopped(case: Case, policy: Any, error: type[BaseException]) -> dict[str, Any]:
    """A roll-out that is stopped in the middle, by which the network has been called as often as was asked."""
    before = ksampler(case, case.model, "heun", "normal")
    asked, called = [], []
    hook = case.native.model.diffusion_model.register_forward_hook(lambda *_: called.append(1))

    def check() -> None:
        asked.append(len(called))
        if len(called) == 4:
            raise error

    try:
        drawn(policy, "heun", "normal", check=check)
    except error:
        asked.append("stopped")
    hook.remove()
    after = ksampler(case, case.model, "heun", "normal")
    return {"asked": asked, "restored": all(torch.equal(a, b) for a, b in zip(before, after, strict=True))}


def names(policy: Any) -> dict[str, Any]:
    """What the node and the policy say of every sampler of ComfyUI's, and of bad names."""
    check = sampling.SamplerSettings.validate_inputs
    return {
        "node": {name: check(solver=name) for name in [*comfy.samplers.SAMPLER_NAMES, *sampling.SOLVER_NAMES]},
        "engine": {name: check(solver=name) for name in ("unipc", "Euler_A", "eulr", "ddpm")},
        "offered": sampling.SOLVER_NAMES,
        "schedulers": [check(scheduler=name) for name in ("model's own", "karras", "nothing")],
        "linked": check(),
        "policy": comfy_lora.error(lambda: policy.solver("euler_ancestral", 3, *SIZE)),
        "plms": comfy_lora.error(lambda: policy.solver("plms", 3, *SIZE)),
        "scheduler": comfy_lora.error(lambda: policy.solver("euler", 3, *SIZE, scheduler="nothing")),
        "alias": policy.solver("unipc", 3, *SIZE).name,
    }


def look(family: str) -> dict[str, Any]:
    case = Case(family)
    policy, other = case.policy(), patched(case)
    on_top = case.policy(other)
    found: dict[str, Any] = {
        "plain": alike(case, policy, case.model, "dpmpp_2m", "karras"),
        "patched": alike(case, on_top, other, "euler", "simple"),
        "adapters": adapters(case, case.policy()),
    }
    on_top.to("cpu")
    if family in ENGINES:
        found |= {
            "samplers": each(case, policy, [(name, "normal") for name in native_sampling.SAMPLERS]),
            "schedulers": each(case, policy, [("dpm_2", name) for name in comfy.samplers.KSampler.SCHEDULERS]),
            "levels": levels(policy),
            "engines": {name: engines(policy, name) for name in ENGINES[family]},
            "stopped": [stopped(case, policy, error) for error in (KeyboardInterrupt, ZeroDivisionError)],
        }
    if family == "sd3":
        found["names"] = names(policy)
    policy.to("cpu")
    return found


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps({family: look(family) for family in FAMILIES}))


if __name__ == "__main__":
    main()
