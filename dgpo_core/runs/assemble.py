"""From settings to the things they name: model, prompts, rewards."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt, load_prompts, read_prompts
from dgpo_core.common.wildcards import drawn
from dgpo_core.evaluation.scores import evaluation_weights, watched
from dgpo_core.method.rollout import Check, nothing
from dgpo_core.people.ask import FOLDER
from dgpo_core.people.gallery import Gallery, read_gallery
from dgpo_core.people.reward import Human
from dgpo_core.policy import Policy, distilled, load_policy
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.rewards import Reward, make_reward
from dgpo_core.settings import shipped
from dgpo_core.settings.config import HUMAN, PEOPLE, Config

Device = torch.device | str


def load_model(config: Config, device: Device) -> tuple[DiffusersPolicy, tuple[int, int]]:
    """The policy on a device, and the image size (height, width) in pixels."""
    model, lora, memory = config.model, config.lora, config.memory
    few_steps = shipped.FEW_STEPS.get(model.few_step_lora, model.few_step_lora)
    keep = memory.prompt_cache_gib > 0 and model.path not in shipped.MODELS  # whose text encoders are tiny
    policy = load_policy(
        shipped.MODELS.get(model.path, model.path),
        family=model.family,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets or None,
        init_lora=lora.init or None,
        dtype=model.dtype,
        device=device,
        seed=config.seed,
        offload=memory.move,
        prediction=model.prediction,
        quantize=model.kept_as,
        quantize_text=model.quantize_text,
        offload_blocks=memory.offload_blocks,
        prompt_cache=memory.prompt_cache if keep else "",
        prompt_cache_bytes=int(memory.prompt_cache_gib * 2**30),
        few_step_lora=few_steps,
    )
    return policy, set_up(policy, config)


def set_up(policy: Policy, config: Config) -> tuple[int, int]:
    """Turns on what the settings ask of a loaded policy; returns the image size (height, width) in pixels."""
    model = config.model
    policy.few_steps = distilled.settled(model.distilled, policy.few_steps)
    if config.memory.recompute:
        policy.enable_gradient_checkpointing()
    if config.memory.compile:
        policy.compile()
    default = policy.default_size
    size = model.height or default[0], model.width or default[1]
    policy.latent_shape(*size)  # refuses a size that the model cannot have
    return size


def rated_groups(config: Config) -> Gallery | None:
    """The rated images that are trained on; None where images are drawn instead."""
    return read_gallery(config.groups) if config.groups else None


def training_prompts(config: Config, gallery: Gallery | None = None) -> list[Prompt]:
    """The prompts that are trained on."""
    if gallery:
        return gallery.prompts
    if config.data.text:
        return _drawn(read_prompts(config.data.text), config)
    if not config.data.prompts:
        raise UserError("There are no training prompts: give a .txt or .jsonl file with --data.prompts FILE.")
    return _drawn(load_prompts(shipped.TRAINING.get(config.data.prompts, config.data.prompts)), config)


def held_out_prompts(config: Config) -> list[Prompt]:
    """The prompts that the gain is measured on; none where the settings name none."""
    if config.data.held_out_text:
        return _drawn(read_prompts(config.data.held_out_text), config)
    if not config.data.held_out:
        return []
    return _drawn(load_prompts(shipped.HELD_OUT.get(config.data.held_out, config.data.held_out)), config)


def _drawn(prompts: list[Prompt], config: Config) -> list[Prompt]:
    """What is drawn of those that stand for many, where the settings ask for that."""
    data = config.data
    return drawn(prompts, data.wildcards, data.wildcard_seed, Path(data.wildcard_folder)) if data.wildcards else prompts


def asks_a_person(config: Config) -> bool:
    """Whether a person scores what is drawn."""
    return HUMAN in [term.name for term in config.reward]


def training_rewards(
    config: Config, device: Device, check: Check = nothing, tell: Callable[[str], None] = print
) -> dict[str, Reward]:
    """The rewards that are trained, by name, but the ratings that images come with.

    check: called while a person is waited for; raises to stop.
    """
    found: dict[str, Reward] = {
        term.name: make_reward(term.name, term.options, str(device))
        for term in config.reward
        if term.name not in PEOPLE
    }
    if asks_a_person(config):
        found[HUMAN] = Human(Path(config.output, config.name, FOLDER), config.human, check, tell, str(device))
    return found


def judges(
    config: Config, trained: Mapping[str, Reward], held_out: Sequence[Prompt], device: Device
) -> dict[str, Reward]:
    """All that an evaluation scores by: what is trained, what measures the gain, and what is watched; never people."""
    found = {name: reward for name, reward in trained.items() if name not in PEOPLE}
    found |= evaluation_rewards(config, trained, device)
    return found | (watched_rewards(config, found, device) if held_out else {})


def evaluation_rewards(config: Config, trained: Mapping[str, Reward], device: Device) -> dict[str, Reward]:
    """The rewards that measure the gain, by name, with the options under which they are trained or watched; none where
    only people could tell it."""
    options, names = _options_of_watched(config), evaluation_weights(config)
    return {name: trained.get(name) or make_reward(name, options.get(name), str(device)) for name in names}


def watched_rewards(config: Config, made: Mapping[str, Reward], device: Device) -> dict[str, Reward]:
    """The rewards that are scored at each evaluation and never trained on, besides those that are `made`."""
    options = _options_of_watched(config)
    names = [name for name in watched(config) if name not in made]
    return {name: make_reward(name, options.get(name), str(device)) for name in names}


def _options_of_watched(config: Config) -> dict[str, Mapping[str, Any]]:
    return {term.name: term.options for term in config.watch}
