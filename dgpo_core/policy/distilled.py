"""Models that were distilled to draw in a few steps: how one is known, and what to do with it before it is trained.

Such a model predicts from pure noise where this very noise leads, not the mean over all pictures as the denoising loss
has it: each step of a training without care moves it back there, and its few steps blur.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dgpo_core.common.reading import shown

_USUAL = {  # what a name says -> (the kind in words, the steps that its makers draw with)
    "schnell": ("FLUX schnell", 4),
    "klein": ("FLUX.2 klein", 4),
    "z[-_ ]?image[-_ ]?turbo": ("Z-Image Turbo", 8),
    "hidream[-_ ]?i1[-_ ]?fast": ("HiDream-I1 Fast", 16),
    "hidream[-_ ]?i1[-_ ]?dev": ("HiDream-I1 Dev", 28),
    "turbo": ("Turbo", 4),
    "lightning": ("Lightning", 4),
    "lcm": ("LCM", 4),
    "tcd": ("TCD", 4),
    "dmd": ("DMD", 4),
    "hyper": ("Hyper", 8),
    "few[-_ ]?steps?": ("few-step", 4),
}
# a word begins at the start, after what is no letter, or with a capital after a small letter or a digit (camel case)
_WORDS = {
    re.compile(rf"(?:(?<![A-Za-z])|(?<=[a-z0-9])(?=[A-Z]))(?i:{word})(?![a-z])"): usual
    for word, usual in _USUAL.items()
}
_STEPS = re.compile(r"(?<![0-9.])(\d{1,2})[-_ ]?steps?(?![a-z])", re.IGNORECASE)
_UNDONE = re.compile(r"de[-_ ]?(?:distil|turbo)|undistil|klein[-_ ]?base", re.IGNORECASE)
_MOST = 16  # a larger number in a name counts something else
_SCHEDULERS = {"LCMScheduler": "LCM", "TCDScheduler": "TCD"}
_TOLD_BY = ("modelspec.architecture", "modelspec.title", "ss_sd_model_name", "ss_base_model_version", "ss_output_name")


@dataclass(frozen=True)
class FewSteps:
    """A model that draws in `steps` steps. kind: "Lightning"; sign: what says so, after "by"."""

    kind: str
    steps: int
    sign: str


def in_name(name: str, sign: str) -> FewSteps | None:
    """What a name says; None where it says nothing of few steps, or that the distillation was undone."""
    if _UNDONE.search(name):
        return None
    found = next((usual for word, usual in _WORDS.items() if word.search(name)), None)
    counted = _STEPS.search(name)
    steps = int(counted[1]) if counted else 0
    if found is None:
        return FewSteps("few-step", steps, sign) if 1 <= steps <= 8 else None
    return FewSteps(found[0], steps if 1 <= steps <= _MOST else found[1], sign)


def find(names: Iterable[str] = (), metadata: Mapping[str, str] | None = None, scheduler: str = "") -> FewSteps | None:
    """Whether a model is one of few steps, by all that is known of it; the first sign counts.

    names: of its file, folder or place on the hub; metadata: of its file's header; scheduler: the class's name.
    """
    signs = [(name, f"its name, {shown(name, 80)}") for name in names]
    own = {key: value for key, value in (metadata or {}).items() if key in _TOLD_BY}
    signs += [(value, f"its header's {key}, {shown(value, 80)}") for key, value in own.items()]
    found = next((few for name, sign in signs if (few := in_name(name, sign))), None)
    if found is None and scheduler in _SCHEDULERS:
        return FewSteps(_SCHEDULERS[scheduler], 4, f"its scheduler, {scheduler}")
    return found


def names_of(path: str) -> list[str]:
    """What of a path may name the model: its last part, and the model's place on the hub where it is of its cache."""
    parts = [part for part in re.split(r"[\\/]", path) if part]
    cached = [part for part in parts if part.startswith("models--")]
    is_id = len(parts) == 2 and not path.startswith((".", "/"))  # owner/name
    return [path] if is_id else [*cached, *parts[-1:]]


def settled(asked: str, found: FewSteps | None) -> FewSteps | None:
    """What `model.distilled` ("auto", "no" or a number of steps) makes of what was found."""
    if asked in ("auto", "no"):
        return found if asked == "auto" else None
    return FewSteps(found.kind if found else "few-step", int(asked), "model.distilled")


def by_config(family: str, network: Mapping[str, Any], scheduler: Mapping[str, Any]) -> FewSteps | None:
    """Whether the configs are FLUX schnell's: no embedded guidance, and noise levels that no image size shifts."""
    if family != "flux" or network.get("guidance_embeds", True) or scheduler.get("use_dynamic_shifting", True):
        return None
    return FewSteps("FLUX schnell", 4, "its configs")
