"""Groups of edits that somebody has: the picture that they were made of, and who can do without it.

Nothing here knows ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.reading import shown
from dgpo_core.common.source import Source
from dgpo_core.policy import Policy
from dgpo_core.rewards import reward_class
from dgpo_core.settings.config import RewardTerm

from ..common.words import named

LABEL = "picture before the edit"
"""What the input is called on the screen."""
NAMED = f'"{LABEL}" (source)'
_EDITORS = "FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit"


def fitted(prompt: Prompt, images: Tensor, fit: Callable[[Tensor], Tensor]) -> tuple[Prompt, Tensor]:
    """`fit` of images [B, 3, H, W], and the prompt with its sources scaled and cropped in the same way.

    So what an edit has left as it was is the same pixels in both, for the rewards and the model. Raises UserError for a
    source of other proportions than the images'.
    """
    before = [_at(source, (images.shape[-2], images.shape[-1])) for source in prompt.sources]
    together = fit(torch.cat([images.cpu().float(), *(picture[None] for picture in before)]))
    pictures = together[: len(images)]
    sources = tuple(Source.of_pixels(picture) for picture in together[len(images) :])
    return replace(prompt, sources=sources), pictures


def _at(source: Source, shape: tuple[int, int]) -> Tensor:
    try:
        return source.fitted(shape)
    except UserError as error:
        raise UserError(
            f"The {NAMED} is {source.size[1]} x {source.size[0]} pixels, and the images made of it are {shape[1]} x"
            f" {shape[0]}: connect the picture as it was edited, cropped to their proportions."
        ) from error


def require_source(policy: Policy, prompt: Prompt) -> None:
    """Raises UserError where the model sees a source with every prompt, and this one has none."""
    if len(prompt.sources) < policy.sources[0]:
        raise UserError(
            f"A model of the family {policy.family} edits pictures: connect the one that was edited to {NAMED}."
        )


def require_editor(policy: Policy, groups: Sequence[Group], size: tuple[int, int]) -> None:
    """Raises UserError for edits that the model would learn without what they were made of; they can be scored."""
    for group in groups:
        if len(group.prompt.sources) > policy.sources[1] == 0:
            raise UserError(
                f"The images of {shown(group.prompt.text, 60)!r} are edits, but a model of the family {policy.family}"
                f" draws from text alone: train one that edits ({_EDITORS}), or disconnect {NAMED} of Group from"
                " Images."
            )
    policy.check_sources([group.prompt for group in groups], size)


def require_sources(terms: Sequence[RewardTerm], groups: Sequence[Group]) -> None:
    """Raises UserError for a reward that compares with the source, where a group has none."""
    bare = next((group.prompt for group in groups if not group.prompt.sources), None)
    for term in terms:
        if bare is not None and reward_class(term.name).needs_source:
            raise UserError(
                f"The reward {term.name} compares with the picture that was edited, and {shown(bare.text, 60)!r} has"
                f" none: connect one to {NAMED} of Group from Images, or to {named('images')} of Prompts."
            )
