"""Sampler Settings and Group Sampler: a group of images per prompt from a deterministic solver."""

from __future__ import annotations

import math
from typing import Any

import comfy.samplers
from comfy_api.v0_0_2 import io

from dgpo_core.comfy.forms import GROUP_SAMPLER, MODELS_OWN, SAMPLER_SETTINGS
from dgpo_core.diffusion.solvers import SOLVERS, choose, find
from dgpo_core.settings.config import RolloutConfig

from .common import fields, host, warn
from .common.values import PolicyHandle, Prompts, Sampler
from .on_model.sampling import SAMPLERS, check_scheduler
from .runs import sessions

_OF_ENGINE = dict.fromkeys(name for names in SOLVERS.values() for name in names)
SOLVER_NAMES = [*SAMPLERS, *(name for name in _OF_ENGINE if not find(name, SAMPLERS))]
"""All that draw without noise on the way; a policy says which of them it has."""


class SamplerSettings(io.ComfyNode):
    """How images are drawn."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_SamplerSettings",
            display_name="Sampler Settings",
            category=f"{host.CATEGORY}/train",
            **fields.aliases("steps", "cfg", "images per prompt"),
            description="Solver, steps, guidance, size of the images and of the groups.",
            inputs=fields.inputs(
                SAMPLER_SETTINGS,
                advanced=("on_policy_steps",),
                solver={"options": SOLVER_NAMES},
                height={"max": 4096, "step": 8},
                width={"max": 4096, "step": 8},
                scheduler={
                    "options": [MODELS_OWN, *comfy.samplers.KSampler.SCHEDULERS],
                    "tooltip": "Noise levels of a native policy: as KSampler's of this name, or the model's own.",
                },
            ),
            outputs=[fields.Sampler.Output(display_name="settings", tooltip="For every node that draws images.")],
        )

    @classmethod
    def validate_inputs(cls, solver: str | None = None, scheduler: str | None = None) -> bool | str:
        """A solver that adds noise is told before anything runs, with the one to use instead."""
        return fields.first_error(solver=(_check_solver, solver), scheduler=(_check_scheduler, scheduler))

    @classmethod
    def execute(cls, height: int, width: int, scheduler: str = MODELS_OWN, **settings: Any) -> io.NodeOutput:
        settings["scheduler"] = "" if scheduler == MODELS_OWN else scheduler
        return io.NodeOutput(Sampler(fields.values(RolloutConfig, settings), height, width))


def _check_solver(name: str) -> None:
    choose(name, SOLVER_NAMES, "DGPO")


def _check_scheduler(name: str) -> None:
    if name != MODELS_OWN:
        check_scheduler(name)


class GroupSampler(io.ComfyNode):
    """Draws the groups of one iteration."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_GroupSampler",
            display_name="Group Sampler",
            category=f"{host.CATEGORY}/step by step",
            **fields.aliases("draw", "group"),
            description="Draws a group of images for each prompt of an iteration; every image has a seed of its own.",
            inputs=fields.inputs(
                GROUP_SAMPLER,
                policy="The model; its run's state at this iteration draws the images.",
                prompts="The prompts; an iteration takes the next few of them.",
                settings="How images are drawn.",
                iteration={
                    "min": sessions.GO_ON,
                    "max": 1_000_000,
                    "control_after_generate": True,
                    "tooltip": "-1 goes on from where the training is: each press of Run is one round. Else the round"
                    " to draw, counted from 0.",
                },
            ),
            outputs=[
                fields.Group.Output(display_name="groups", tooltip="The groups, for a scorer or ranker."),
                io.Image.Output(display_name="images", tooltip="All images in one batch, group after group."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, iteration: int | None = None, **_: Any) -> int:
        """Where the run goes on is elsewhere after each step."""
        return 0 if iteration is not None and iteration >= 0 else sessions.steps_kept()

    @classmethod
    def execute(cls, policy: PolicyHandle, prompts: Prompts, settings: Sampler, iteration: int) -> io.NodeOutput:
        tick = host.Progress(forwards(settings, prompts.per_iteration), cls.hidden.unique_id)
        warn.of_syntax(policy, prompts.prompts)
        iteration = sessions.where(policy, iteration)
        groups = sessions.draw(policy, prompts.at(iteration), settings, iteration, tick)
        return io.NodeOutput(groups, host.images_of(groups.groups))


def forwards(settings: Sampler, groups: int) -> int:
    """About how many forwards it takes to draw so many groups."""
    images = groups * settings.rollout.group_size
    return settings.rollout.steps * math.ceil(images / (settings.rollout.at_once or images))


NODES = [SamplerSettings, GroupSampler]
