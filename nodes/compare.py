"""Before / After: the same prompts and seeds without and with the adapter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy_api.v0_0_2 import io, ui

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.pictures import grid
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.reading import shown
from dgpo_core.common.source import Source
from dgpo_core.evaluation.scores import total
from dgpo_core.rewards import weights_of
from dgpo_core.settings.config import EvalConfig, RewardTerm

from .common import fields, host
from .common.values import PolicyHandle, Prompts, Sampler
from .on_model import texts
from .on_model.policy import sees_references
from .on_model.sampling import SAMPLERS
from .runs import scoring, sessions


class BeforeAfter(io.ComfyNode):
    """Two rows per prompt: the base, and the trained model, from the same seeds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_BeforeAfter",
            display_name="Before / After",
            category=f"{host.CATEGORY}/use",
            **fields.aliases("compare", "difference", "side by side"),
            description="Draws the same prompts and seeds before and after: with a policy, or with two MODELs.",
            is_output_node=True,
            inputs=[
                fields.Prompts.Input("prompts", tooltip="The first few of these prompts are drawn."),
                fields.Sampler.Input("settings", tooltip="Steps, guidance and size (and, of a policy, the solver)."),
                io.Int.Input(
                    "first", default=4, min=1, max=64, display_name="prompts to draw", tooltip="The first so many."
                ),
                io.Int.Input(
                    "images",
                    default=4,
                    min=1,
                    max=64,
                    display_name="images per prompt",
                    tooltip="Images of each prompt, side by side.",
                ),
                io.Int.Input(
                    "first_seed",
                    default=1_000_000,
                    min=0,
                    max=fields.SEEDS,
                    display_name="first seed",
                    tooltip="Seed of the first image of each prompt; the next has the next number.",
                ),
                fields.Policy.Input("policy", optional=True, tooltip="A trained policy; or connect two models below."),
                fields.Reward.Input("reward", optional=True, tooltip="Scores both, under each image and in all."),
                fields.weights_input(optional=True),
                io.Model.Input("model_before", optional=True, tooltip="A model without the LoRA."),
                io.Model.Input("model_after", optional=True, tooltip="The model with the LoRA."),
                io.Clip.Input("clip", optional=True, tooltip="Of the two models."),
                io.Vae.Input("vae", optional=True, tooltip="Of the two models."),
                io.Combo.Input(
                    "sampler", options=list(SAMPLERS), optional=True, tooltip="ComfyUI's sampler, for two models."
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    optional=True,
                    tooltip="ComfyUI's scheduler, for two models.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="Both rows of every prompt, labelled, with their scores."),
                io.String.Output(display_name="rewards", tooltip="The mean rewards before and after."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        """A policy straight from Load Policy stands for where its run is now."""
        return sessions.steps_kept()

    @classmethod
    def execute(
        cls,
        prompts: Prompts,
        settings: Sampler,
        first: int,
        images: int,
        first_seed: int,
        policy: PolicyHandle | None = None,
        reward: Sequence[RewardTerm] | None = None,
        weights: str = EvalConfig().weights,
        **models: Any,
    ) -> io.NodeOutput:
        few = list(prompts.prompts[:first])
        if reward:
            scoring.require_ready(reward, few)
        seeds = [first_seed + i for i in range(images)]
        if policy is not None:
            handle = sessions.resolve(policy, sessions.store(policy.spec).newest())
            before = sessions.draw_with(handle, None, few, seeds, settings)
            after = sessions.draw_with(handle, weights, few, seeds, settings)
        else:
            before, after = (_native(models, name, few, seeds, settings) for name in ("model_before", "model_after"))
        return _output(cls, before, after, tuple(reward or ()))


def _native(models: Any, name: str, prompts: Sequence[Prompt], seeds: Sequence[int], settings: Sampler) -> list[Group]:
    """What KSampler draws from each seed, one group per prompt."""
    missing = [what for what in (name, "clip", "vae") if models.get(what) is None]
    if missing:
        raise UserError(f"Connect a policy, or all of model_before, model_after, clip and vae; missing: {missing[0]}.")
    model, clip, vae, rollout = models[name], models["clip"], models["vae"], settings.rollout
    height, width = settings.height or 512, settings.width or 512
    unit, device = int(vae.spacial_compression_encode()), comfy.model_management.intermediate_device()

    @functools.cache  # the negative prompt is the same for all prompts without pictures
    def conditioning(text: str, sources: tuple[Source, ...]) -> Any:
        edited = [source.fitted((height, width)) for source in sources]
        return texts.referring(texts.encoded(clip, text, edited), vae, edited)

    groups = []
    for prompt in prompts:
        _require_editor(model, name, prompt)
        positive, negative = (conditioning(text, prompt.sources) for text in (prompt.text, rollout.negative_prompt))
        pictures = []
        for seed in seeds:
            empty = torch.zeros(1, 4, height // unit, width // unit, device=device)
            latent = comfy.sample.fix_empty_latent_channels(model, empty)
            noise = comfy.sample.prepare_noise(latent, seed)
            x0 = comfy.sample.sample(
                model, noise, rollout.steps, rollout.cfg, models.get("sampler") or SAMPLERS[0],
                models.get("scheduler") or comfy.samplers.KSampler.SCHEDULERS[0], positive, negative, latent, seed=seed,
            )  # fmt: skip
            decoded = vae.decode(x0)
            pictures.append(decoded.reshape(-1, *decoded.shape[-3:]))  # a video's model has a dimension more
        shown = torch.cat(pictures).permute(0, 3, 1, 2).float().cpu()
        groups.append(Group(prompt, tuple(seeds), torch.zeros(len(seeds), 0), shown))
    return groups


def _require_editor(model: Any, name: str, prompt: Prompt) -> None:
    if prompt.sources and not sees_references(model.model):
        raise UserError(
            f"The prompt {shown(prompt.text, 60)!r} brings a picture to edit, and {name} looks at none: connect prompts"
            " without pictures, or a MODEL that edits (FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit)."
        )


def _output(cls: type, before: list[Group], after: list[Group], terms: tuple[RewardTerm, ...]) -> io.NodeOutput:
    """The two rows of each prompt under each other, and the means."""
    pairs = [
        replace(group, prompt=Prompt(f"{group.prompt.text} - {label}", group.prompt.metadata))
        for both in zip(before, after, strict=True)
        for group, label in zip(both, ("before", "after"), strict=True)
    ]
    scores, said = None, "no reward connected"
    if terms:
        counting = {name: weight for name, weight in weights_of(terms).items() if weight}
        rows = [[total(group, counting) for group in scoring.score_all(groups, terms)] for groups in (before, after)]
        means = [float(torch.cat(row).mean()) for row in rows]
        scores = [r for both in zip(*rows, strict=True) for r in both]
        said = f"{'+'.join(counting)}: {means[0]:.3f} before, {means[1]:.3f} after"
    sheet = host.to_image(grid(pairs, said, scores))
    shown = ui.PreviewImage(sheet, cls=cls).as_dict()
    return io.NodeOutput(sheet, said, ui={**shown, **_for_the_slider(cls, before, after)})


def _for_the_slider(cls: type, before: list[Group], after: list[Group]) -> dict[str, Any]:
    """The single pictures, in the same order on both sides, and what each is; see web/compare.js."""
    sides = {"before": before, "after": after}
    found = {name: ui.PreviewImage(host.images_of(side), cls=cls).as_dict()["images"] for name, side in sides.items()}
    return {**found, "captions": [f"{group.prompt.text} (seed {seed})" for group in after for seed in group.seeds]}


NODES = [BeforeAfter]
