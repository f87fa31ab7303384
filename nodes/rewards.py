"""Rewards: what the images of a group are scored by, from the engine, from other nodes, or from ratings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.v0_0_2 import io

from dgpo_core.comfy.forms import REWARD_SCORER, REWARD_TERM
from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt, refuse_foreign
from dgpo_core.common.reading import parse_json
from dgpo_core.rewards import AUTOMATIC, chosen_file, known_rewards, require_reward
from dgpo_core.rewards.trust import check_shared
from dgpo_core.settings.config import RewardTerm
from dgpo_core.settings.gates import Gate

from .common import fields, host, warn
from .common.contact_sheet import combined, contact_sheet
from .common.numbers import numbers_in
from .common.values import Groups, PolicyHandle, Sampler, with_scores
from .prompts import about
from .runs import edits, sessions


class Reward(io.ComfyNode):
    """One reward of the engine; several are chained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_Reward",
            display_name="Reward",
            category=f"{host.CATEGORY}/rewards",
            **fields.aliases("score", "pickscore", "aesthetic", "preference", "reinforcement"),
            description="What images are scored by. Chain several: their weighted scores add up.",
            inputs=fields.inputs(
                REWARD_TERM,
                name={
                    "display_name": "score by",
                    "options": known_rewards(),
                    "tooltip": "The reward; its help page says what it needs.",
                },
                weight={
                    "min": -1000.0,
                    "max": 1000.0,
                    "step": 0.01,
                    "tooltip": "Negative: less is better. 0: only a condition of another.",
                },
                options='Options as JSON, such as {"batch": 4}; or empty.',
                reward={"display_name": "add to", "tooltip": "Rewards that this one is added to."},
                only_if="Counts only where another reward of the chain says so: ocr > 0.5; or empty.",
                weights_file={
                    "options": host.reward_file_choices(),
                    "display_name": "model file",
                    "tooltip": "The file in models/reward_models to score with; automatic finds the published one, or"
                    " downloads it.",
                },
            ),
            outputs=[fields.Reward.Output(display_name="reward", tooltip="For the Reward Scorer, or the next reward.")],
        )

    @classmethod
    def validate_inputs(
        cls, name: str | None, options: str | None, only_if: str | None = "", weights_file: str | None = AUTOMATIC
    ) -> bool | str:
        """What the reward lacks (a package, weights) and what is wrong with its widgets: told before anything runs.

        A file that is not there is not refused by ComfyUI, since it is asked about here: the published one may be
        found or downloaded without it.
        """
        file = weights_file if name in known_rewards() else None
        return fields.first_error(
            only_if=(lambda only_if: Gate.of(only_if, name or "") if only_if.strip() else None, only_if),
            options=(lambda options: term(name or "", 1.0, options), options),
            weights_file=(lambda choice: _check_file(name or "", choice), file),
            name=(
                lambda name: require_reward(name, term(name, 1.0, options or "", "", file or "").options),
                name or None,
            ),
        )

    @classmethod
    def execute(
        cls,
        name: str,
        weight: float,
        options: str,
        reward: Sequence[RewardTerm] | None = None,
        only_if: str = "",
        weights_file: str = AUTOMATIC,
    ) -> io.NodeOutput:
        before = tuple(reward or ())
        if any(other.name == name for other in before):
            raise UserError(f"The reward {name} can be in a chain only once.")
        return io.NodeOutput((*before, term(name, weight, options, only_if.strip(), weights_file)))


def _check_file(name: str, choice: str) -> None:
    """Raises UserError for a file that is not there, or none of the reward's."""
    chosen = chosen_file(name, choice)
    if chosen:
        require_reward(name, chosen)


def term(name: str, weight: float, options: str, only_if: str = "", weights_file: str = AUTOMATIC) -> RewardTerm:
    """What the widgets say. Raises UserError for what a workflow, which is shared, may not decide."""
    found = parse_json(options, "The text in the reward's options") if options.strip() else {}
    if not isinstance(found, dict):
        raise UserError('The options of the reward must be an object such as {"batch": 4}.')
    made = RewardTerm(name, weight, {**found, **chosen_file(name, weights_file)}, only_if)
    check_shared([made], "The workflow")
    return made


class RewardScorer(io.ComfyNode):
    """Scores groups with the engine's rewards."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_RewardScorer",
            display_name="Reward Scorer",
            category=f"{host.CATEGORY}/rewards",
            **fields.aliases("score", "rate", "preference"),
            description="Scores every image. Green frames: better than the rest of their group, favoured; red: worse.",
            inputs=fields.inputs(REWARD_SCORER, groups="The groups to score.", reward="What they are scored by."),
            outputs=[
                fields.Group.Output(display_name="scored", tooltip="The groups with their scores, for the trainer."),
                io.Float.Output(display_name="scores", tooltip="The score of each image.", is_output_list=True),
                io.Image.Output(display_name="sheet", tooltip="The groups with scores, both halves framed."),
            ],
        )

    @classmethod
    def execute(cls, groups: Groups, reward: Sequence[RewardTerm]) -> io.NodeOutput:
        edits.require_sources(reward, groups.groups)
        scored = sessions.score(groups, reward)
        return scored_output(scored)


def scored_output(scored: Groups) -> io.NodeOutput:
    """Groups, score of each image, contact sheet (shown on the node, too)."""
    sheet = contact_sheet(scored)
    scores = [value for group in scored.groups for value in combined(group, scored).tolist()]
    return io.NodeOutput(scored, scores, host.to_image(sheet), ui=host.on_node(sheet))


class ScoresFromGraph(io.ComfyNode):
    """Any other node as the reward."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_ScoresFromGraph",
            display_name="Scores from Graph",
            category=f"{host.CATEGORY}/rewards",
            **fields.aliases("custom reward", "score"),
            description="Takes scores from any other nodes: a number per image, a list, a text with numbers, a mask.",
            is_input_list=True,
            inputs=[
                fields.Group.Input("groups", tooltip="The groups whose images were scored."),
                io.AnyType.Input(
                    "scores", tooltip="One number per image, in the order of the images; of a mask, its mean."
                ),
                io.String.Input(
                    "name",
                    default="graph",
                    display_name="name of the scores",
                    tooltip="What to call these scores in metrics and metadata.",
                ),
            ],
            outputs=[
                fields.Group.Output(display_name="scored", tooltip="The groups with their scores, for the trainer."),
                io.Float.Output(display_name="scores", tooltip="The score of each image.", is_output_list=True),
                io.Image.Output(display_name="sheet", tooltip="The groups with scores, both halves framed."),
            ],
        )

    @classmethod
    def execute(cls, groups: list[Groups], scores: list[Any], name: list[str]) -> io.NodeOutput:
        return scored_output(with_scores(groups[0], numbers_in(scores), name[0].strip() or "graph"))


class GroupFromImages(io.ComfyNode):
    """Pictures that the artist has, with ratings, as a group to train on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_GroupFromImages",
            display_name="Group from Images",
            category=f"{host.CATEGORY}/rewards",
            **fields.aliases("preference", "dpo", "gallery", "ratings", "human feedback"),
            description="Makes a scored group of pictures you have: offline preferences, no image is drawn.",
            inputs=[
                io.Image.Input("images", tooltip="Two or more pictures of one prompt, in one batch."),
                io.String.Input("prompt", default="", multiline=True, tooltip="What the pictures show."),
                fields.Policy.Input("policy", tooltip="The model to train on them."),
                fields.Sampler.Input("settings", tooltip="Solver and steps: training takes noise levels from them."),
                io.String.Input(
                    "ratings",
                    default="",
                    tooltip="One number per picture, higher is better: 5 3 1 4; empty where a node behind scores them.",
                ),
                io.Int.Input(
                    "iteration",
                    default=sessions.GO_ON,
                    min=sessions.GO_ON,
                    max=1_000_000,
                    control_after_generate=True,
                    display_name="round (iteration)",
                    tooltip="-1 goes on from where the training is: each press of Run is one round. Else the round to"
                    " train, counted from 0.",
                ),
                fields.Group.Input(
                    "groups", optional=True, display_name="add to", tooltip="Groups of other prompts to train on too."
                ),
                io.Image.Input(
                    "source",
                    optional=True,
                    display_name=edits.LABEL,
                    tooltip="Only for edits: the one picture that all of these were made of; some rewards, and models"
                    " that edit, look at it.",
                ),
            ],
            outputs=[
                fields.Group.Output(display_name="scored", tooltip="The scored group, for the trainer."),
                io.Float.Output(display_name="scores", tooltip="The rating of each picture.", is_output_list=True),
                io.Image.Output(display_name="sheet", tooltip="The groups with ratings, both halves framed."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, iteration: int | None = None, **_: Any) -> int:
        """Where the run goes on is elsewhere after each step."""
        return 0 if iteration is not None and iteration >= 0 else sessions.steps_kept()

    @classmethod
    def execute(
        cls,
        images: Any,
        prompt: str,
        policy: PolicyHandle,
        settings: Sampler,
        ratings: str,
        iteration: int,
        groups: Groups | None = None,
        source: Any = None,
    ) -> io.NodeOutput:
        if not prompt.strip():
            raise UserError("Write what the pictures show into the prompt.")
        asked, numbers = Prompt(prompt.strip()), numbers_in([ratings])
        refuse_foreign(asked)
        if source is not None:
            asked = edit(asked, source)
        warn.of_syntax(policy, [asked])
        warn.of_equal(numbers)
        iteration = sessions.where(policy, iteration)
        group = sessions.encode(policy, asked, images[..., :3].permute(0, 3, 1, 2), settings, iteration)
        scored = with_scores(group, numbers, "ratings") if ratings.strip() else group
        return scored_output(scored.after(groups) if groups else scored)


def edit(prompt: Prompt, source: Any) -> Prompt:
    """The prompt with the picture [1, H, W, 3] that its images were made of. Raises UserError for several."""
    if len(source) != 1:
        raise UserError(
            f"Connect one picture to {edits.NAMED}, not {len(source)}: all images of a group are made of the same one."
        )
    return about([prompt], source)[0]


NODES = [Reward, RewardScorer, ScoresFromGraph, GroupFromImages]
