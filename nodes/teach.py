"""Teach: a whole training in one node, for who says only what to teach, and who judges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from comfy_api.v0_0_2 import io

from dgpo_core.comfy.forms import LOAD_POLICY, PROMPT_LIST, TEACH_ME, TEXT, shipped_model
from dgpo_core.common.prompts import Prompt
from dgpo_core.people.questions import MODES
from dgpo_core.policy import family_of
from dgpo_core.rewards import check_cheaply, known_rewards, require_reward
from dgpo_core.settings import shipped
from dgpo_core.settings.config import EMBEDDED, MOST_ITERATIONS, Config, RewardTerm
from dgpo_core.settings.recipes import kind_in_comfyui, recipe

from .common import fields, host, warn
from .common.values import PolicyHandle, PolicySpec, Prompts, Sampler, Training
from .prompts import read, read_again
from .runs import loop, sessions
from .runs.finishing import FINISHING
from .runs.judges import ByPerson, ByRewards, Judge
from .training import told, trained_lora

WEIGHTS = "ema"
SAVE_EVERY = 5
_NEED_OPTIONS = ("remote", "vlm_judge", "taste")  # which server or file; nodes of their own have widgets for that


class Teach(io.ComfyNode):
    """Model, prompts and a judge in; a LoRA out. The steps are those of the Training Loop, with the same keys."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_Teach",
            display_name="Teach",
            category=host.CATEGORY,
            **fields.aliases("reinforcement", "rlhf", "dpo", "human feedback", "preference", "train lora", "start"),
            description="Start here: teaches a model what you like, or what a reward likes. You get a LoRA.",
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "model",
                    options=host.model_choices(),
                    tooltip="What to teach: the embedded model needs no download and no graphics card; or a file in"
                    " models/checkpoints, or a folder in models/diffusers.",
                ),
                *fields.inputs(
                    PROMPT_LIST.part("source", "text"),
                    source={
                        "options": host.prompt_file_choices(),
                        "default": EMBEDDED,
                        "tooltip": "What to draw: the embedded model's own prompts, the text below, or a file in"
                        " ComfyUI's input folder.",
                    },
                    text={"multiline": True, "tooltip": "One prompt per line; lines that start with # are not."},
                ),
                io.Combo.Input(
                    "judge",
                    options=[TEACH_ME, *(name for name in known_rewards() if name not in _NEED_OPTIONS)],
                    default=TEACH_ME,
                    display_name="who judges",
                    tooltip=f'"{TEACH_ME}": a dialog shows you the pictures, and you click the best. Else a reward: its'
                    " help is in the help of the node Reward.",
                ),
                io.Float.Input(
                    "minutes",
                    default=3.0,
                    min=0.1,
                    max=100_000.0,
                    step=0.5,
                    tooltip="For how long to teach, in all, with your own time; a larger number goes on.",
                ),
                *fields.inputs(LOAD_POLICY.part("run"), run={"default": "teach"}),
                fields.Policy.Input(
                    "policy",
                    optional=True,
                    display_name="other model",
                    tooltip="A model of this graph (DGPO Policy) or one with settings of your own (Load Policy), in"
                    " place of the one above.",
                ),
                fields.Reward.Input(
                    "reward", optional=True, tooltip="Rewards with weights and options, in place of the judge above."
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=64,
                    optional=True,
                    display_name="image size",
                    tooltip="Height and width in pixels; 0 suits the model.",
                    **fields.ADVANCED,
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    optional=True,
                    display_name="how to ask",
                    tooltip="rank: put images in order, best first. thumbs: mark images as good or bad. pairs: choose"
                    " the better one of two, pair by pair.",
                    **fields.ADVANCED,
                ),
                *fields.inputs(LOAD_POLICY.part("run_seed"), run_seed={**fields.RUN["run_seed"], **fields.LATER}),
            ],
            outputs=[
                io.LoraModel.Output(display_name="lora", tooltip="What was learned, for Save LoRA."),
                fields.Policy.Output(display_name="policy", tooltip="The model after this training."),
                fields.Prompts.Output(display_name="prompts", tooltip="What was drawn, for Before / After."),
                fields.Sampler.Output(display_name="settings", tooltip="How it was drawn, for Before / After."),
                fields.Reward.Output(display_name="reward", tooltip="What judged; nothing where you did."),
                io.Image.Output(display_name="curve", tooltip="What the pictures scored, round by round."),
                io.String.Output(display_name="said", tooltip="What was done, and what came of it."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        model: str | None = None,
        source: str | None = None,
        text: str | None = None,
        judge: str | None = None,
        run: str | None = None,
        policy: Any = "",
        reward: Any = "",
    ) -> bool | str:
        """Names and files that are not there, and a judge that cannot judge these prompts, before anything runs.

        What is connected comes as None; what it takes the place of is not looked at.
        """
        model, run = (model, run) if policy is not None else (None, None)
        judge = judge if reward is not None else None
        prompts = None if source is None or (source == TEXT and text is None) else source
        return fields.first_error(
            model=(host.model_path, model),
            run=(host.check_run, run),
            **{"text" if source == TEXT else "source": (lambda source: read(source, text or ""), prompts)},
            judge=(lambda judge: _check_judge(judge, read(prompts, text or "") if prompts else []), judge),
        )

    @classmethod
    def fingerprint_inputs(
        cls, source: str | None = None, text: str | None = None, run: str | None = None, **_: Any
    ) -> list[object]:
        """A prompt file that has changed, a run that has gone another way, and a press of Finish now."""
        return [read_again(source, text), sessions.turns(run), FINISHING.times(cls.hidden.unique_id)]

    @classmethod
    def execute(
        cls,
        model: str,
        source: str,
        text: str,
        judge: str,
        minutes: float,
        run: str,
        policy: PolicyHandle | None = None,
        reward: Sequence[RewardTerm] | None = None,
        size: int = 0,
        mode: str = MODES[0],
        run_seed: int = 0,
    ) -> io.NodeOutput:
        by = _judge(judge, reward, mode)
        chosen = recipe(_kind(model, policy), isinstance(by, ByPerson))
        handle = policy or PolicyHandle(_spec(model, run, run_seed, chosen))
        prompts = Prompts(tuple(read(source, text)), chosen.data.groups_per_iteration, 0)
        warn.of_syntax(handle, prompts.prompts)
        sampler = Sampler(chosen.rollout, size or chosen.model.height, size or chosen.model.width)
        settings = Training(chosen.training, chosen.combine)
        seconds = 60 * minutes
        plan = loop.Plan(handle, prompts, sampler, by, settings, MOST_ITERATIONS, SAVE_EVERY, seconds=seconds)
        done = loop.run(plan, host.Progress(math.ceil(seconds), cls.hidden.unique_id))
        lora = trained_lora(done, sampler, settings, by.terms, WEIGHTS)
        curve, scored_by = host.to_image(loop.curve(done.state, done.log)), by.terms if by.scores_alone else ()
        outputs = lora, done.policy, prompts, sampler, scored_by, curve, done.said
        return io.NodeOutput(*outputs, ui=told(cls, curve, done.said))


def _check_judge(choice: str, prompts: Sequence[Prompt]) -> None:
    if choice != TEACH_ME:
        require_reward(choice)
        check_cheaply(RewardTerm(choice), prompts)


def _judge(choice: str, reward: Sequence[RewardTerm] | None, mode: str) -> Judge:
    if reward:
        return ByRewards(tuple(reward))
    if choice == TEACH_ME:
        return ByPerson(mode)
    require_reward(choice)
    return ByRewards((RewardTerm(choice),))


def _kind(model: str, policy: PolicyHandle | None) -> str:
    """What `recipe` goes by."""
    spec = policy.spec if policy else None
    if spec and spec.source == "native":  # its name begins with what ComfyUI calls the kind
        return kind_in_comfyui(spec.model.path.rpartition("-")[0])
    path = host.model_path(spec.model.path if spec else model)
    return path if path in shipped.MODELS else family_of(path)


def _spec(model: str, run: str, seed: int, chosen: Config) -> PolicySpec:
    """As Load Policy gives it out with these settings, so that a Training Loop can go on from here."""
    settings = replace(chosen.model, path=shipped_model(model) or model, height=0, width=0)
    return PolicySpec(host.check_run(run), seed, settings, chosen.lora, chosen.memory)


NODES = [Teach]
