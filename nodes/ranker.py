"""Human Ranker: a person, or a ranking written down beforehand, says which images of each group are better."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management
import torch
from comfy_api.v0_0_2 import io

from dgpo_core.common.errors import UserError
from dgpo_core.common.terminal import say
from dgpo_core.evaluation.scores import total
from dgpo_core.people.apprentice import Apprentice
from dgpo_core.people.ask import FOLDER
from dgpo_core.people.preferences import parse_preset, preset_answers
from dgpo_core.people.questions import MODES, Answer
from dgpo_core.people.reward import apprentice_of
from dgpo_core.rewards import weights_of
from dgpo_core.settings.config import HumanConfig, RewardTerm

from .common import fields, host
from .common.bounded import Bounded
from .common.values import Groups, key_of
from .runs import edits, judges, scoring, sessions

TIME_OUT = "when time runs out"
SKIP, REWARD, CANCEL = "skip the update", "use a reward", "cancel"
NO_REWARD = f'Connect a reward, or set "{TIME_OUT}" (on_timeout) to something else than "{REWARD}".'
WEEK = 7 * 24 * 3600

_apprentices: Bounded[Apprentice] = Bounded(2)


class HumanRanker(io.ComfyNode):
    """Shows the groups to a person and scores them by the answer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_HumanRanker",
            display_name="Human Ranker",
            category=f"{host.CATEGORY}/rewards",
            **fields.aliases("human feedback", "rlhf", "preference", "compare", "rank", "vote"),
            description="Asks you which images of each group are better. The run waits for your answer.",
            not_idempotent=True,
            inputs=[
                fields.Group.Input("groups", tooltip="The groups of images to look at."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    display_name="how to ask",
                    tooltip="rank: put images in order, best first. thumbs: mark images as good or bad. "
                    "pairs: choose the better one of two, pair by pair.",
                ),
                io.Int.Input(
                    "timeout",
                    default=600,
                    min=0,
                    max=WEEK,
                    display_name="seconds to wait",
                    tooltip="Seconds to wait for your answer to all groups together; 0 waits for ever.",
                ),
                io.Combo.Input(
                    "on_timeout",
                    options=[SKIP, REWARD, CANCEL],
                    default=SKIP,
                    display_name=TIME_OUT,
                    tooltip="When time runs out: train nothing in this iteration, use the reward's scores, or stop.",
                ),
                io.String.Input(
                    "preset",
                    default="",
                    multiline=True,
                    optional=True,
                    display_name="answers without a person",
                    tooltip="Rankings for runs without a person, one for each group, separated by ; or line ends: "
                    "image numbers from 1, best first, joined by > and = (tied), such as 3>1=2, with * for all "
                    "others (the worst come after it), or skip. Empty asks you.",
                ),
                fields.Reward.Input(
                    "reward", optional=True, tooltip=f'Scores instead of you, where {TIME_OUT} is "{REWARD}".'
                ),
                io.Int.Input(
                    "pairs",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    display_name="pairs per prompt",
                    tooltip="How many pairs of each group mode pairs asks about; 0: one and a half times as many as "
                    "the group has images.",
                ),
                io.Boolean.Input(
                    "taste",
                    default=False,
                    optional=True,
                    display_name="ask only where unsure",
                    tooltip="Learns your taste from your answers and then answers what it is sure of.",
                ),
                io.Int.Input(
                    "answers",
                    default=HumanConfig.answers,
                    min=0,
                    max=1_000_000,
                    optional=True,
                    display_name="stop asking after",
                    tooltip="With the taste: ask about so many prompts; then it goes on alone. 0 goes on asking.",
                ),
            ],
            outputs=[
                fields.Group.Output(display_name="scored", tooltip="The groups with your scores, for the trainer."),
                io.Image.Output(display_name="best", tooltip="The best image of each group."),
            ],
        )

    @classmethod
    def validate_inputs(cls, preset: str | None = "", on_timeout: str | None = None) -> bool | str:
        """A preset that cannot be read, and a reward that is missing, are told before anything is drawn."""
        return fields.first_error(preset=(parse_preset, preset), on_timeout=(_check_late, on_timeout))

    @classmethod
    def execute(
        cls,
        groups: Groups,
        mode: str,
        timeout: int,
        on_timeout: str,
        preset: str = "",
        reward: Sequence[RewardTerm] | None = None,
        pairs: int = 0,
        taste: bool = False,
        answers: int = HumanConfig.answers,
    ) -> io.NodeOutput:
        if on_timeout == REWARD and not reward:
            raise UserError(NO_REWARD)
        if on_timeout == REWARD:
            edits.require_sources(reward, groups.groups)
            scoring.require_ready(reward, [group.prompt for group in groups.groups])
        apprentice = _apprentice(groups.policy.spec.run, answers) if taste else None
        answer = _answer(groups, mode, pairs, timeout, preset, apprentice)
        if answer is None and on_timeout == CANCEL:
            raise comfy.model_management.InterruptProcessingException
        by_reward = answer is None and on_timeout == REWARD
        scored = sessions.score(groups, reward) if by_reward else judges.by_person(groups, answer)
        return io.NodeOutput(scored, _best(scored))


def _check_late(choice: str) -> None:
    if choice not in (SKIP, REWARD, CANCEL):
        raise UserError(f"There is no {choice} for that: choose one of the list.")


def _apprentice(run: str, answers: int) -> Apprentice:
    """The one that learns from the answers of a run."""
    settings = HumanConfig(taste=True, answers=answers)
    folder = host.runs_folder() / run / FOLDER
    return _apprentices.take(key_of(str(folder), settings), lambda: apprentice_of(folder, settings, say, host.device()))


def _answer(
    groups: Groups, mode: str, pairs: int, timeout: int, preset: str, apprentice: Apprentice | None
) -> Answer | None:
    """From the preset, else from an earlier run over the same groups, else from a person; None: nobody in time."""
    if preset.strip():
        return Answer(tuple(preset_answers(preset, [len(group) for group in groups.groups])))
    return judges.ask_person(groups, mode, pairs, timeout, apprentice=apprentice)


def _best(groups: Groups) -> torch.Tensor:
    """The image with the highest score of each group, [B, H, W, 3]."""
    weights = weights_of(groups.terms)
    best = [group.images[int(total(group, weights).argmax())] for group in groups.groups]
    return torch.stack(best).permute(0, 2, 3, 1).contiguous()


NODES = [HumanRanker]
