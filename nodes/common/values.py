"""What flows along the graph's edges: small frozen values. Weights and optimisers stay in `held` and on disk.

Nothing here knows ComfyUI.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt, PromptStream
from dgpo_core.settings.config import LoraConfig, MemoryConfig, ModelConfig, RewardTerm, RolloutConfig, TrainingConfig


@dataclass(frozen=True)
class PolicySpec:
    """A model with its fresh LoRA: all that is needed to make the state before the first step again.

    run: name of the run's folder. model.path and lora.init are names in ComfyUI's lists, not paths, so that a run can
    move to another machine; "embedded" is the embedded model. source: which function of `sources` makes the model;
    of a native one, model.path is its name in `on_model.models`.
    """

    run: str
    seed: int
    model: ModelConfig
    lora: LoraConfig
    memory: MemoryConfig
    source: str = "files"


@dataclass(frozen=True)
class PolicyHandle:
    """A policy in one state of its training.

    state: the key of the state, "" for "where the run is at the step that is asked for" (what Load Policy gives out);
    step: optimiser steps that led to `state`.
    """

    spec: PolicySpec
    step: int = 0
    state: str = ""


@dataclass(frozen=True)
class Prompts:
    """Prompts to train on, how many of them an iteration takes, and the seed of their order."""

    prompts: tuple[Prompt, ...]
    per_iteration: int
    seed: int

    def __str__(self) -> str:
        """In few words: ComfyUI keeps all inputs of a node that has failed as texts, and sends them to every page."""
        return f"{len(self.prompts)} prompts, {self.per_iteration} an iteration"

    def at(self, iteration: int) -> list[tuple[int, Prompt]]:
        """The prompts of an iteration, counted from 0, with their places in it."""
        return list(enumerate(PromptStream(self.prompts, self.per_iteration, self.seed).at(iteration)))


@dataclass(frozen=True, eq=False)
class Conditionings:
    """Prompts with a CONDITIONING of ComfyUI's for each: (text for rewards, conditioning), no text twice."""

    prompts: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        """In few words, as that of prompts."""
        return f"{len(self.prompts)} conditionings"

    def and_then(self, text: str, conditioning: Any) -> "Conditionings":
        """One more. Raises UserError for an empty text, and for one that is there."""
        text = text.strip()
        if not text:
            raise UserError("A Conditioned Prompt needs a text: what rewards and the labels of the images go by.")
        if text in dict(self.prompts):
            raise UserError(f"Two Conditioned Prompts have the text {text!r}: give each a text of its own.")
        return Conditionings((*self.prompts, (text, conditioning)))


@dataclass(frozen=True)
class Sampler:
    """How images are drawn; height and width in pixels, 0 is the model's own."""

    rollout: RolloutConfig
    height: int = 0
    width: int = 0


@dataclass(frozen=True)
class Training:
    """From scores to weights."""

    training: TrainingConfig
    combine: str = "sum"


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of one iteration, with the state that drew them.

    policy: a handle with its `state` filled in; terms: the rewards that scored them, with their weights; empty before
    scoring. key: equal for equal groups (and equal scores), drawn with equal settings.
    """

    groups: tuple[Group, ...]
    policy: PolicyHandle
    sampler: Sampler
    iteration: int
    key: str
    terms: tuple[RewardTerm, ...] = field(default=())

    def __str__(self) -> str:
        """In few words, as that of prompts."""
        return f"{len(self.groups)} groups of iteration {self.iteration}"

    def after(self, others: "Groups") -> "Groups":
        """These groups behind `others`: one iteration that trains on both. Raises UserError where they do not fit."""
        if others.policy != self.policy or others.terms != self.terms:
            raise UserError("Groups can be joined only where they are of one policy and scored by the same rewards.")
        sizes = {tuple(group.images.shape[2:]) for group in (*others.groups, *self.groups)}
        if len(sizes) > 1:
            told = " and ".join(f"{width} x {height}" for height, width in sorted(sizes))
            raise UserError(f"Groups can be joined only where their images are of one size, not {told}.")
        key = key_of("join", others.key, self.key)
        return dataclasses.replace(self, groups=(*others.groups, *self.groups), key=key)


def with_scores(groups: Groups, scores: Sequence[float], name: str) -> Groups:
    """The groups with one number per image, in their order. Raises UserError for another count or a bad number."""
    sizes = [len(group) for group in groups.groups]
    if len(scores) != sum(sizes):
        raise UserError(f"There are {len(scores)} scores for {sum(sizes)} images: give one number per image.")
    if not all(math.isfinite(score) for score in scores):
        raise UserError("A score is not a finite number: give one number per image.")
    parts = torch.tensor(scores, dtype=torch.float32).split(sizes)
    scored = tuple(group.scored({name: part}) for group, part in zip(groups.groups, parts, strict=True))
    key = scored_key(groups.key, name, scores)
    return dataclasses.replace(groups, groups=scored, terms=(RewardTerm(name),), key=key)


def scored_key(groups: str, name: str, scores: Sequence[float]) -> str:
    """The key of groups, by theirs, with one number per image from elsewhere than a reward of the engine."""
    return key_of(groups, name, list(scores))


NEWER = ("kl_target", "norm_guard", "distilled", "few_step_lora")
"""Settings that runs of earlier versions did not have: at their defaults they are in no key, so such runs go on."""


def key_of(*parts: Any) -> str:
    """The same 16 letters for the same values: dataclasses, numbers, strings, and containers of them."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            compared = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.compare}
            defaults = {f.name: f.default for f in dataclasses.fields(value)}
            newer = [name for name in NEWER if name in compared and compared[name] == defaults[name]]
            return {"": type(value).__name__, **{n: v for n, v in compared.items() if n not in newer}}
        if hasattr(value, "items"):
            return dict(value)
        return list(value)

    return hashlib.sha256(json.dumps(parts, default=plain, sort_keys=True).encode()).hexdigest()[:16]
