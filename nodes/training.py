"""Training Settings, DGPO LoRA Trainer (one iteration) and Training Loop (many)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.v0_0_2 import io, ui

from dgpo_core.comfy.forms import (
    LORA_TRAINER,
    TRAINING_LOOP,
    TRAINING_SETTINGS,
    chosen_preset,
    preset_choices,
)
from dgpo_core.common.errors import UserError
from dgpo_core.settings.config import RewardTerm, TrainingConfig

from .common import fields, host, warn, words
from .common.lora_model import LoraModel
from .common.values import Groups, PolicyHandle, Prompts, Sampler, Training
from .runs import forecast, loop, sessions
from .runs.finishing import FINISHING
from .runs.judges import ByRewards
from .runs.watching import Log, Watching

# What an artist meets first; the rest is for those who know the method.
_FIRST = ("preset", "combine", "kl_weight", "t_min", "micro_batch", "lr")


class TrainingSettings(io.ComfyNode):
    """From scores to weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_TrainingSettings",
            display_name="Training Settings",
            category=f"{host.CATEGORY}/train",
            **fields.aliases("reinforcement", "rlhf", "dpo", "learning rate", "kl"),
            description="How scores become weights. A preset, or everything by hand.",
            inputs=fields.inputs(
                TRAINING_SETTINGS,
                advanced=[name for name in TRAINING_SETTINGS.inputs if name not in _FIRST],
                preset={
                    "options": preset_choices(),
                    "tooltip": "Good values for a model and a reward, shown in the widgets below. A mode"
                    " is one of the paper's three ways to train.",
                },
            ),
            outputs=[fields.Training.Output(display_name="settings", tooltip="For the trainer or the loop.")],
        )

    @classmethod
    def validate_inputs(cls, preset: str | None = None) -> bool | str:
        """A preset that there is not, and what does not fit the other nodes, are told before anything runs."""
        return fields.first_error(preset=(_check_preset, preset))

    @classmethod
    def execute(cls, preset: str, combine: str, **settings: Any) -> io.NodeOutput:
        chosen = chosen_preset(preset)
        if chosen:
            return io.NodeOutput(Training(chosen[0], chosen[1] or combine))
        _check_preset(preset)
        return io.NodeOutput(Training(fields.values(TrainingConfig, settings), combine))


def _check_preset(choice: str) -> None:
    if choice not in preset_choices():
        raise UserError(f"There is no preset {choice}: choose one of the list.")


def trained_outputs() -> list[io.Output]:
    """What a trainer gives out."""
    return [
        fields.Policy.Output(display_name="policy", tooltip="The model after this training; its state never changes."),
        io.LoraModel.Output(display_name="lora", tooltip="The adapter, for Save LoRA or the DGPO LoRA Loader."),
        io.LossMap.Output(display_name="loss", tooltip="The loss of every iteration so far, for loss plots."),
        io.Image.Output(display_name="curve", tooltip="The reward of every iteration so far."),
        io.String.Output(display_name="metrics", tooltip="The numbers of the last iteration."),
    ]


class LoRATrainer(io.ComfyNode):
    """One iteration: compare the images of each group, and take one step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_LoRATrainer",
            display_name="DGPO LoRA Trainer",
            category=f"{host.CATEGORY}/step by step",
            **fields.aliases("reinforcement", "rlhf", "dpo", "train lora"),
            description="Takes one training step from scored groups. The same step is never taken twice.",
            is_output_node=True,
            inputs=fields.inputs(
                LORA_TRAINER,
                **fields.WEIGHTS,
                policy="The model; straight from Load Policy, the state that drew.",
                scored="Groups with scores.",
                settings="How scores become weights.",
            ),
            outputs=trained_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, weights: str | None = None) -> bool | str:
        """What does not fit the other nodes is told before anything runs."""
        return fields.first_error(weights=(_check_weights, weights))

    @classmethod
    def execute(cls, policy: PolicyHandle, scored: Groups, settings: Training, weights: str) -> io.NodeOutput:
        loop.require_scores(scored)
        tick = host.Progress(loop.update_steps(scored, settings), cls.hidden.unique_id)
        prompts = Prompts(tuple(group.prompt for group in scored.groups), len(scored.groups), 0)
        tick.at(0, text=forecast.tell(policy.spec, prompts, scored.sampler, settings, rounds=0))
        after, state = sessions.learn(policy, scored, settings, tick)
        sessions.keep(after, state)
        done = loop.Done(after, state, Log(None), loop.gain(state, scored.terms))
        return trained(cls, done, scored.sampler, settings, scored.terms, weights)


def trained(
    cls: type,
    done: loop.Done,
    sampler: Sampler,
    settings: Training,
    terms: Sequence[RewardTerm],
    adapter: str,
) -> io.NodeOutput:
    """The five outputs, and on the node the curve and what is to be said."""
    lora, curve = trained_lora(done, sampler, settings, terms, adapter), host.to_image(loop.curve(done.state, done.log))
    losses = {"loss": [record["loss"] for record in done.state.history]}
    metrics = loop.describe(done.state, done.log)
    return io.NodeOutput(done.policy, lora, losses, curve, metrics, ui=told(cls, curve, done.said))


def trained_lora(
    done: loop.Done, sampler: Sampler, settings: Training, terms: Sequence[RewardTerm], adapter: str
) -> LoraModel:
    """The adapter with what it was made by."""
    config = sessions.config_of(done.policy.spec, sampler, settings.training, terms, settings.combine)
    return sessions.lora(done.policy, done.state, terms, config, adapter)


def told(cls: type, picture: Any, text: str) -> dict[str, Any]:
    """A picture and a text for the node."""
    return {**ui.PreviewImage(picture, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}


class TrainingLoop(io.ComfyNode):
    """Whole iterations, one after the other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_TrainingLoop",
            display_name="Training Loop",
            category=f"{host.CATEGORY}/train",
            **fields.aliases("reinforcement", "rlhf", "dpo", "grpo", "train lora"),
            description="Draws, scores and trains, again and again, in one press. Cancel keeps the last iteration; the "
            "next press goes on from there.",
            is_output_node=True,
            inputs=fields.inputs(
                TRAINING_LOOP,
                advanced=("save_every", "evaluation_images"),
                **fields.WEIGHTS,
                policy="The model to train.",
                prompts="What to draw.",
                sampler="How to draw.",
                reward="What the images are scored by.",
                settings="How scores become weights.",
                save_every={"min": 1, "max": 10_000},
                held_out="Prompts that are not trained on: drawn from the same seeds every time, to see what is"
                " learned.",
                watch="Rewards that are only scored on them, never trained, besides statistics.",
                evaluate_every={"min": 1, "max": 10_000},
                evaluation_images={
                    "min": 2,
                    "max": 10_000,
                    "tooltip": "Images drawn from the test prompts each time: more show smaller changes.",
                },
                on_alarm={
                    "default": None,
                    "tooltip": "Where something else that is measured falls while the reward rises: warn, or stop"
                    " and give out the best state before.",
                },
            ),
            outputs=trained_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, weights: str | None = None) -> bool | str:
        """What does not fit the other nodes is told before anything runs."""
        return fields.first_error(weights=(_check_weights, weights))

    @classmethod
    def execute(
        cls,
        policy: PolicyHandle,
        prompts: Prompts,
        sampler: Sampler,
        reward: Sequence[RewardTerm],
        settings: Training,
        iterations: int,
        save_every: int,
        weights: str,
        held_out: Prompts | None = None,
        watch: Sequence[RewardTerm] = (),
        evaluate_every: int = 10,
        evaluation_images: int = 64,
        on_alarm: str = "warn",
    ) -> io.NodeOutput:
        watching = None
        if held_out:
            rewards = tuple(reward), tuple(watch)
            stops = on_alarm == "stop"
            watching = Watching(held_out.prompts, sampler, *rewards, evaluate_every, evaluation_images, weights, stops)
        elif watch:
            raise UserError(
                f"What is connected to {words.named('watch')} is measured on test prompts: connect some to"
                f" {words.named('held_out')}."
            )
        warn.of_syntax(policy, [*prompts.prompts, *(held_out.prompts if held_out else ())])
        judge = ByRewards(tuple(reward))
        plan = loop.Plan(policy, prompts, sampler, judge, settings, iterations, save_every, watching)
        done = loop.run(plan, host.Progress(iterations, cls.hidden.unique_id))
        return trained(cls, done, sampler, settings, reward, weights)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        """Once it was told to finish, what came of it does not stand for the whole training: the next Run goes on."""
        return FINISHING.times(cls.hidden.unique_id)


def _check_weights(choice: str) -> None:
    if choice not in fields.WEIGHTS["weights"]["options"]:
        raise UserError(f"There is no LoRA {choice}: choose current or ema.")


NODES = [TrainingSettings, LoRATrainer, TrainingLoop]
