"""Graphs that train a ComfyUI MODEL and draw with it, in API format."""

from __future__ import annotations

from typing import Any

from comfy_graphs import Graph

LORA = {"run_seed": 0, "rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "", "start_from": "none",
        "gradient_checkpointing": False}  # fmt: skip
DEFAULTS = {
    "advantage_std": "group", "advantage_clamp": 5.0, "beta": 100.0, "logit_scaling": "official", "clip": 0.0,
    "kl_weight": 0.0, "kl_cfg": 1.0, "reference": "frozen", "timesteps": 1, "timestep_source": "rollout", "t_min": 0.0,
    "micro_batch": 4, "lr": 0.01, "weight_decay": 0.0, "betas": "0.9, 0.99", "max_grad_norm": 1.0,
    "ema_fast_max": 0.3, "ema_fast_rate": 0.001, "ema_slow": 0.9, "ema_slow_every": 8,
}  # fmt: skip


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node in API format."""
    return {"class_type": kind, "inputs": inputs}


def graph(iteration: int) -> Graph:
    """An ordinary KSampler beside one iteration of training on the same MODEL."""
    model, clip, vae = (["loader", i] for i in range(3))
    training = {"timesteps": 1, "t_min": 0.0, "micro_batch": 4, "lr": 0.01, "clip": 0.0, "kl_weight": 0.0}
    return {
        "loader": node("CheckpointLoaderSimple", ckpt_name="sd_v1-5.safetensors"),
        "policy": node("DGPO_NativePolicy", model=model, clip=clip, vae=vae, run="native", **LORA),
        "prompts": node("DGPO_Prompts", source="the text below", text="a lamp", per_iteration=1, order_seed=0),
        "settings": node(
            "DGPO_SamplerSettings", solver="ddim", steps=3, cfg=1.0, group_size=4, batch=4, negative_prompt="",
            on_policy_steps=100, height=64, width=64,
        ),
        "groups": node(
            "DGPO_GroupSampler", policy=["policy", 0], prompts=["prompts", 0], settings=["settings", 0],
            iteration=iteration,
        ),
        "reward": node("DGPO_Reward", name="brightness", weight=1.0, options=""),
        "scores": node("DGPO_RewardScorer", groups=["groups", 0], reward=["reward", 0]),
        "training": node("DGPO_TrainingSettings", preset="as set below", combine="sum", **DEFAULTS | training),
        "trainer": node(
            "DGPO_LoRATrainer", policy=["policy", 0], scored=["scores", 0], settings=["training", 0], weights="current"
        ),
        "save": node("DGPO_SaveLoRA", lora=["trainer", 1], name="native", metadata=""),
        "lora": node(
            "DGPO_LoRALoader", model=model, clip=clip, lora=["trainer", 1], lora_name="none", strength_model=1.0,
            strength_clip=1.0,
        ),
        "said": node("PreviewAny", source=["lora", 2]),
        **ksampler("plain", model),
        **ksampler("trained", ["lora", 0]),
    }  # fmt: skip


def ksampler(name: str, model: list[Any]) -> dict[str, Any]:
    """An ordinary picture of a model."""
    sampler = {
        "model": model, "positive": [f"{name} text", 0], "negative": [f"{name} text", 0],
        "latent_image": [f"{name} latent", 0], "seed": 3, "steps": 2, "cfg": 1.0, "sampler_name": "euler",
        "scheduler": "normal", "denoise": 1.0,
    }  # fmt: skip
    return {
        f"{name} text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["loader", 1], "text": "a lamp"}},
        f"{name} latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        f"{name} sampler": {"class_type": "KSampler", "inputs": sampler},
        f"{name} vae": {"class_type": "VAEDecode", "inputs": {"samples": [f"{name} sampler", 0], "vae": ["loader", 2]}},
        name: {"class_type": "PreviewImage", "inputs": {"images": [f"{name} vae", 0]}},
    }
