"""The names of states, groups and evaluations: each is a hash of all that it depends on, so equal ones are equal.

Nothing here knows ComfyUI.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.policy import AdapterName
from dgpo_core.settings.config import RewardTerm

from ..common.values import PolicyHandle, Sampler, Training, key_of


def drawn(handle: PolicyHandle, places: Sequence[tuple[int, Prompt]], sampler: Sampler) -> str:
    """Of the groups that a state draws for (place in the iteration, prompt)."""
    same = replace(sampler, rollout=replace(sampler.rollout, batch=0))  # bounds memory, changes no image
    asked = [(g, p.text, p.metadata, *(source.key for source in p.sources)) for g, p in places]
    return key_of("draw", handle.state, asked, same)


def given(handle: PolicyHandle, group: Group, sampler: Sampler) -> str:
    """Of a group whose images somebody has brought; without a source as it was before there were any."""
    digest = hashlib.sha256(group.images.numpy().tobytes()).hexdigest()
    sources = (source.key for source in group.prompt.sources)
    return key_of("images", handle.state, group.prompt.text, digest, sampler, *sources)


def scored(groups: str, terms: Sequence[RewardTerm]) -> str:
    """Of groups, by their key, with the scores of these rewards."""
    return key_of("score", groups, terms)


def learned(handle: PolicyHandle, groups: str, training: Training) -> PolicyHandle:
    """The state that one step from `handle`'s on scored groups, by their key, leads to."""
    same = replace(training, training=replace(training.training, micro_batch=1))  # bounds memory
    return PolicyHandle(handle.spec, handle.step + 1, key_of("learn", handle.state, groups, same))


def evaluated(
    handle: PolicyHandle,
    adapter: AdapterName | None,
    prompts: Sequence[Prompt],
    images: int,
    sampler: Sampler,
    terms: Sequence[RewardTerm],
) -> str:
    """Of an evaluation of one adapter of a state, or of the base (None), whatever the state."""
    state = "" if adapter is None else handle.state
    groups = drawn(replace(handle, state=state), list(enumerate(prompts)), sampler)
    return key_of("evaluate", scored(groups, terms), images, adapter or "")
