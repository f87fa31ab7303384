"""Rewards: what the images are scored by. A new one is one file and one line in `REWARDS`."""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from dgpo_core.errors import UserError
from dgpo_core.rewards.base import Reward, score_groups

REWARDS: dict[str, str] = {
    "shapes": "dgpo_core.rewards.shapes:Shapes",
    "shapes_graded": "dgpo_core.rewards.shapes:ShapesGraded",
    "clip_score": "dgpo_core.rewards.clip_score:ClipScore",
    "pickscore": "dgpo_core.rewards.pickscore:PickScore",
    "aesthetic": "dgpo_core.rewards.aesthetic:Aesthetic",
    "ocr": "dgpo_core.rewards.ocr:Ocr",
    "geneval": "dgpo_core.rewards.geneval:GenEval",
    "jpeg_size": "dgpo_core.rewards.statistics:JpegSize",
    "edge_density": "dgpo_core.rewards.statistics:EdgeDensity",
    "entropy": "dgpo_core.rewards.statistics:Entropy",
    "brightness": "dgpo_core.rewards.statistics:Brightness",
    "saturation": "dgpo_core.rewards.statistics:Saturation",
    "group_diversity": "dgpo_core.rewards.statistics:GroupDiversity",
    "vlm_judge": "dgpo_core.rewards.vlm_judge:VlmJudge",
    "remote": "dgpo_core.rewards.remote:Remote",
}
"""Name -> "module:class". The module is imported when the reward is first used."""


def make_reward(name: str, options: Mapping[str, Any] | None = None, device: str = "cpu") -> Reward:
    """The reward `name`, ready to score on `device`. Raises UserError for an unknown name or an unknown option."""
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(REWARDS)}."
        raise UserError(f"Unknown reward {name!r}: {hint}")
    module, _, attribute = REWARDS[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    options = dict(options or {})
    try:
        inspect.signature(cls).bind(device=device, **options)
    except TypeError as error:
        raise UserError(f"Reward {name!r} does not take these options: {error}.") from None
    return cls(device=device, **options)


__all__ = ["REWARDS", "Reward", "make_reward", "score_groups"]
