"""What diffusers' own pipeline of a policy's family draws from the same noise and prompts, for tests that compare."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny
import torch
from torch import Tensor

from dgpo_core.policy import Cond
from dgpo_core.policy.pipeline import DiffusersPolicy

LATENTS: dict[str, tuple[int, int, int]] = {"flux2": (16, 8, 8)}
"""Of a picture of the tiny models, where they are not 4 x 16 x 16."""
_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": False}


def scheduler(name: str, config: dict[str, Any]) -> Any:
    """The scheduler that a user of diffusers would put into the pipeline for this name of a solver."""
    if "shift" not in config:
        build = {
            "ddim": lambda: diffusers.DDIMScheduler.from_config(config, clip_sample=False),
            "plms": lambda: diffusers.PNDMScheduler.from_config(config, skip_prk_steps=True),
            "euler": lambda: diffusers.EulerDiscreteScheduler.from_config(config),
            "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler.from_config(config),
            "unipc": lambda: diffusers.UniPCMultistepScheduler.from_config(config),
        }
        return build[name]()
    flow = {**config, **_FLOW, "flow_shift": config["shift"]}
    dynamic = config["use_dynamic_shifting"]
    build = {
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler.from_config(config),
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler.from_config(config),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler.from_config(flow),
        "unipc": lambda: diffusers.UniPCMultistepScheduler.from_config({**flow, "use_dynamic_shifting": dynamic}),
    }
    return build[name]()


def latents(
    policy: DiffusersPolicy,
    solver: str,
    noise: Tensor,
    cond: Cond,
    steps: int,
    uncond: Cond | None = None,
    cfg: float = 1.0,
) -> Tensor:
    """Clean latents [B,C,h,w] of its pipeline with the scheduler that goes with `solver`. cond, uncond: as encoded."""
    pipe = policy.pipe
    if policy.family == "chroma" and len(cond) > 1:  # a call has texts of one length
        rows = range(len(cond))
        return torch.cat([latents(policy, solver, noise[[i]], cond.select([i]), steps, uncond, cfg) for i in rows])
    given = _GIVEN.get(policy.family, _plain)(policy, cond, uncond, cfg)
    before = pipe.scheduler
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe.scheduler = scheduler(solver, policy.scheduler_config)
        found: Tensor = pipe(
            latents=_as_taken(policy, noise),
            num_inference_steps=steps, output_type="latent", height=tiny.SIZE, width=tiny.SIZE, **given,
        )[0]  # fmt: skip
    finally:
        pipe.scheduler = before
    if policy.family in _PACKED:
        return pipe._unpack_latents(found, tiny.SIZE, tiny.SIZE, policy._factor).reshape(noise.shape)
    if policy.family == "flux2":  # it gives them as its VAE has them
        mean, std = _of_batch_norm(policy)
        return (pipe._patchify_latents(found) - mean) / std
    return found.squeeze(2) if policy.family == "wan" else found


def _as_taken(policy: DiffusersPolicy, noise: Tensor) -> Tensor:
    """Noise [B,C,h,w] as its pipeline takes it."""
    if policy.family == "wan":  # for one frame
        return noise.unsqueeze(2)
    packed: Tensor = policy.pipe._pack_latents(noise, *noise.shape) if policy.family in _PACKED else noise
    return packed


def _plain(policy: DiffusersPolicy, cond: Cond, uncond: Cond | None, cfg: float) -> dict[str, Any]:
    given = {"guidance_scale": cfg, "prompt_embeds": cond.tensors["tokens"]}
    if "pooled" in cond.tensors:
        given["pooled_prompt_embeds"] = cond.tensors["pooled"]
    if uncond is not None:
        given["negative_prompt_embeds"] = uncond.tensors["tokens"]
        if "pooled" in cond.tensors:
            given["negative_pooled_prompt_embeds"] = uncond.tensors["pooled"]
    return given


def _flux(policy: DiffusersPolicy, cond: Cond, uncond: Cond | None, cfg: float) -> dict[str, Any]:
    return {**_plain(policy, cond, uncond, cfg), "guidance_scale": policy.guidance}


def _zimage(policy: DiffusersPolicy, cond: Cond, uncond: Cond | None, cfg: float) -> dict[str, Any]:
    given = {"guidance_scale": cfg - 1, "prompt_embeds": _texts(cond)}  # of it the guided difference comes on top of c
    return given if uncond is None else {**given, "negative_prompt_embeds": _texts(uncond)}


def _texts(cond: Cond) -> list[Tensor]:
    return [row[mask] for row, mask in zip(cond.tensors["tokens"], cond.tensors["mask"], strict=True)]


def _qwenimage(policy: DiffusersPolicy, cond: Cond, uncond: Cond | None, cfg: float) -> dict[str, Any]:
    given = {"true_cfg_scale": cfg, **_masked(cond, "")}
    return given if uncond is None else {**given, **_masked(uncond, "negative_")}


def _masked(cond: Cond, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}prompt_embeds": cond.tensors["tokens"], f"{prefix}prompt_embeds_mask": cond.tensors["mask"]}


def _chroma(policy: DiffusersPolicy, cond: Cond, uncond: Cond | None, cfg: float) -> dict[str, Any]:
    given = {"guidance_scale": cfg}
    for prefix, one in (("", cond), ("negative_", uncond)):
        if one is not None:
            tokens = one.tensors["tokens"][:, one.tensors["mask"][0]]
            given |= {f"{prefix}prompt_embeds": tokens, f"{prefix}prompt_attention_mask": torch.ones(tokens.shape[:2])}
    return given


def _sana(policy: DiffusersPolicy, cond: Cond, uncond: Cond | None, cfg: float) -> dict[str, Any]:
    given = {"guidance_scale": cfg, "negative_prompt": None, "use_resolution_binning": False}
    both = Cond.cat([cond] if uncond is None else [cond, uncond]).tensors  # it wants both of one length
    for prefix, rows in (("", slice(0, len(cond))), ("negative_", slice(len(cond), None))):
        if rows.start < len(both["mask"]):
            tokens, mask = both["tokens"][rows], both["mask"][rows]
            given |= {f"{prefix}prompt_embeds": tokens, f"{prefix}prompt_attention_mask": mask}
    return given


def _hidream(policy: DiffusersPolicy, cond: Cond, uncond: Cond | None, cfg: float) -> dict[str, Any]:
    policy.pipe.default_sample_size = tiny.SIZE // policy._factor  # else it would draw as many pixels as it always does
    given = {"guidance_scale": cfg}
    for prefix, one in (("", cond), ("negative_", uncond)):
        if one is not None:
            given[f"{prefix}prompt_embeds_t5"] = one.tensors["tokens"]
            given[f"{prefix}prompt_embeds_llama3"] = one.tensors["layers"].transpose(0, 1)
            given[f"{prefix}pooled_prompt_embeds"] = one.tensors["pooled"]
    return given


def _wan(policy: DiffusersPolicy, cond: Cond, uncond: Cond | None, cfg: float) -> dict[str, Any]:
    return {**_plain(policy, cond, uncond, cfg), "num_frames": 1}


_GIVEN = {
    "chroma": _chroma,
    "flux": _flux,
    "hidream": _hidream,
    "qwenimage": _qwenimage,
    "sana": _sana,
    "wan": _wan,
    "zimage": _zimage,
}
_PACKED = ("chroma", "flux", "qwenimage")
_OF_FILMS = ("qwenimage", "qwen-image-edit", "wan")
"""Whose VAE is one of films."""


# --- the VAE ---------------------------------------------------------------------------------------------------------


def _of_batch_norm(policy: DiffusersPolicy) -> tuple[Tensor, Tensor]:
    """FLUX.2's mean and deviation, [1,C,1,1]."""
    vae = policy.pipe.vae
    spread = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return vae.bn.running_mean.view(1, -1, 1, 1), spread.view(1, -1, 1, 1)


def decoded(policy: DiffusersPolicy, z: Tensor) -> Tensor:
    """Pictures in -1..1, not clamped, of latents as they are drawn: what its pipeline does at its end."""
    vae, config = policy.pipe.vae, policy.pipe.vae.config
    if policy.family in _OF_FILMS:
        mean, std = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (config.latents_mean, config.latents_std))
        return vae.decode((z * std + mean).unsqueeze(2)).sample[:, :, 0]
    if policy.family == "flux2":
        mean, std = _of_batch_norm(policy)
        return vae.decode(policy.pipe._unpatchify_latents(z * std + mean)).sample
    if policy.family == "sana":
        return vae.decode(z / config.scaling_factor).sample
    return vae.decode(z / config.scaling_factor + (config.shift_factor or 0.0)).sample


def encoded(policy: DiffusersPolicy, images: Tensor) -> Tensor:
    """Latents as they are drawn of pictures in -1..1."""
    vae, config = policy.pipe.vae, policy.pipe.vae.config
    if policy.family in _OF_FILMS:
        mean, std = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (config.latents_mean, config.latents_std))
        return (vae.encode(images.unsqueeze(2)).latent_dist.mode()[:, :, 0] - mean) / std
    if policy.family == "flux2":
        return policy.pipe._encode_vae_image(images, None)
    if policy.family == "sana":
        return vae.encode(images).latent * config.scaling_factor
    return (vae.encode(images).latent_dist.mode() - (config.shift_factor or 0.0)) * config.scaling_factor
