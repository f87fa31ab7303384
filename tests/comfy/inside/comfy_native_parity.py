"""Run by `test_native_parity.py` in ComfyUI's folder and interpreter: the native policy beside the diffusers one.

Both hold the embedded model's weights: its transformer in ComfyUI's own class, converted by ComfyUI's own code, and its
text encoders and VAE behind the methods that a CLIP and a VAE of ComfyUI's have.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))
import utils.install_util  # noqa: F401 - before another module that is called `utils` hides ComfyUI's

# isort: split
import comfy_lora

# isort: split
import comfy.model_patcher
import comfy.utils
import comfy_networks
import torch
from comfy_lora import difference
from comfy_networks import CPU, Native
from torch import Tensor, nn

from dgpo_core.common.distributed import World
from dgpo_core.evaluation.held_out import HeldOut
from dgpo_core.evaluation.scores import evaluation_weights
from dgpo_core.method.iteration import Iteration
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy import load_policy
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.runs import assemble
from dgpo_core.settings.config import Config
from dgpo_core.settings.presets import load_preset

native_policy = importlib.import_module("pack.on_model.policy")
native_texts = importlib.import_module("pack.on_model.texts")
NAMES = ("current", "old", "ema")
SIZE = (64, 64)
SHARED = {"to_out.0": "attn.proj", "to_add_out": "attn.proj", "ff.net.2": "mlp.fc2", "ff_context.net.2": "mlp.fc2"}
"""Layers that are the same in diffusers' network and in ComfyUI's, which fuses q, k and v."""
ITERATIONS = 3
RISING = 16
IMAGES = 100


class Clip:
    """The embedded model's text encoders as a CLIP of ComfyUI's."""

    layer_idx = None

    def __init__(self, policy: DiffusersPolicy) -> None:
        self.policy = policy
        self.patcher = comfy.model_patcher.ModelPatcher(nn.Linear(2, 2), CPU, CPU)

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list[Any]:
        tensors = self.policy._encode(text)
        return [[tensors["tokens"], {"pooled_output": tensors["pooled"]}]]


class Vae:
    """The embedded model's VAE as one of ComfyUI's: from latents as samplers give them out to [B, H, W, 3]."""

    def __init__(self, policy: DiffusersPolicy) -> None:
        self.vae = policy.pipe.vae
        self.patcher = comfy.model_patcher.ModelPatcher(self.vae, CPU, CPU)

    def spacial_compression_encode(self) -> int:
        return 8

    def decode(self, latents: Tensor) -> Tensor:
        return (self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)


def native(policy: DiffusersPolicy) -> Native:
    """The embedded model's transformer in ComfyUI's class, with weights as its loaders make them."""
    network = type(policy.network).from_pretrained(comfy_lora.DEMO, subfolder="transformer", torch_dtype=torch.float32)
    with torch.inference_mode():
        return comfy_networks.native_sd3(network)


def settings(**training: Any) -> Config:
    """The quickstart's, in smaller iterations."""
    preset = load_preset("quickstart")
    return replace(
        preset,
        data=replace(preset.data, groups_per_iteration=2),
        rollout=replace(preset.rollout, group_size=8, cfg=2.0, negative_prompt="a red circle"),
        training=replace(preset.training, **training),
    )


def trainer(policy: Any, config: Config) -> Trainer:
    world = World("cpu")
    prompts, rewards = assemble.training_prompts(config), assemble.training_rewards(config, world.device)
    return Trainer(policy, prompts, rewards, config, size=SIZE, world=world)


def names(found: Native) -> dict[str, str]:
    """ComfyUI's name of each of diffusers' modules that it has as it is."""
    table = comfy.utils.mmdit_to_diffusers(found.model.model_config.unet_config)
    return {
        key.removesuffix(".weight"): name.removesuffix(".weight")
        for key, name in table.items()
        if isinstance(name, str) and key.endswith(".weight")
    }


def renamed(adapter: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """An adapter of the diffusers policy under ComfyUI's names."""
    parts = {key: key.rpartition(".lora_") for key in adapter}
    return {f"{table[module]}.lora_{rest}": adapter[key] for key, (module, _, rest) in parts.items()}


def compare(ours: Iteration, theirs: Iteration) -> dict[str, Any]:
    """How far one iteration is from the other."""
    pairs = list(zip(ours.groups, theirs.groups, strict=True))
    return {
        "seeds": all(a.seeds == b.seeds and a.prompt == b.prompt for a, b in pairs),
        "latents": max(difference(a.latents, b.latents) for a, b in pairs),
        "images": max(float((a.images - b.images).abs().max()) for a, b in pairs),
        "metrics": {key: [ours.metrics[key], theirs.metrics[key]] for key in theirs.metrics},
    }


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
    """|ours - theirs| as a share of |theirs - before|, over all tensors of an adapter."""
    ours, theirs = ({key: value.detach() for key, value in adapter.items()} for adapter in (ours, theirs))
    apart = sum(float((ours[key] - theirs[key]).square().sum()) for key in theirs)
    moved = sum(float((theirs[key] - before[key]).square().sum()) for key in theirs)
    return (apart / moved) ** 0.5


def on(network: comfy_networks.Native, diffusers: DiffusersPolicy, **lora: Any) -> Any:
    """A native policy on the network, with the text encoders and the VAE of the diffusers policy."""
    encode = native_texts.by_clip(Clip(diffusers)).encode
    return native_policy.NativePolicy(network.patcher(), encode, Vae(diffusers), seed=0, **lora)


def parity(config: Config) -> list[dict[str, Any]]:
    """Some iterations of both policies from the same adapter on the layers that both have."""
    diffusers = load_policy(comfy_lora.DEMO, rank=4, alpha=8.0, targets=tuple(SHARED), dtype="float32")
    found = native(diffusers)
    targets = tuple(dict.fromkeys(SHARED.values()))
    policy = on(found, diffusers, rank=4, alpha=8.0, targets=targets)
    table = names(found)
    for name in NAMES:
        state, start = policy.adapter_state(name), renamed(diffusers.adapter_state(name), table)
        assert set(state) == set(start), set(state) ^ set(start)
        with torch.no_grad():
            for key, parameter in state.items():
                parameter.copy_(start[key])
    before = {key: value.detach().clone() for key, value in policy.adapter_state("current").items()}
    ours, theirs, seen = trainer(policy, config), trainer(diffusers, config), []
    for _ in range(ITERATIONS):
        seen.append(compare(ours.iterate(), theirs.iterate()))
        for name in NAMES:
            adapter = renamed(diffusers.adapter_state(name), table)
            seen[-1][name] = distance(policy.adapter_state(name), adapter, before)
    policy.to("cpu")
    return seen


def rising() -> dict[str, Any]:
    """The quickstart on ComfyUI's network, with a LoRA on its own layers and in smaller iterations."""
    config = load_preset("quickstart")
    config = replace(
        config,
        data=replace(config.data, groups_per_iteration=4),
        rollout=replace(config.rollout, group_size=12, steps=6),
        training=replace(config.training, t_min=5, lr=2e-3),
    )
    diffusers = load_policy(comfy_lora.DEMO, rank=4, dtype="float32")
    policy = on(native(diffusers), diffusers, rank=32, alpha=64.0, targets=())
    start, world = time.monotonic(), World("cpu")
    held_out, judges = assemble.held_out_prompts(config), assemble.evaluation_rewards(config, {}, world.device)
    measured = HeldOut.of(config, policy, held_out, judges, SIZE, world)
    found = trainer(policy, config)
    rewards = [found.iterate().metrics["reward"] for _ in range(RISING)]
    told = {
        name or "base": measured.measure(name, IMAGES, evaluation_weights(config)).as_json()
        for name in (None, "current")
    }
    policy.to("cpu")
    return {**told, "rewards": rewards, "seconds": time.monotonic() - start}


def main() -> None:
    torch.set_num_threads(1)
    found = {
        "free": parity(settings()),
        "held": parity(settings(clip=1e-3, kl_weight=0.1, kl_cfg=2.0)),
        "rising": rising(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
