"""What does not stop a graph but should be known before it draws: in ComfyUI's log, once for each text."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

from dgpo_core.common.prompt_syntax import syntax_warning
from dgpo_core.common.prompts import Prompt
from dgpo_core.policy.distilled import FewSteps
from dgpo_core.runs.few_steps import few_steps_warning
from dgpo_core.settings.config import RolloutConfig

from .values import PolicyHandle

_log = logging.getLogger(__name__)


def of_syntax(policy: PolicyHandle, prompts: Sequence[Prompt]) -> None:
    """Tell what is taken as words in the prompts; a native policy's go through ComfyUI's own text encoders."""
    text = syntax_warning(prompts, by_comfyui=policy.spec.source == "native")
    if text:
        _tell(text)


def of_few_steps(few: FewSteps | None, rollout: RolloutConfig) -> None:
    """Tell that the model is one of few steps, and what to set."""
    text = few_steps_warning(few, rollout)
    if text:
        _tell(text)


def of_equal(ratings: Sequence[float]) -> None:
    """Tell that ratings which are all the same teach nothing."""
    if len(set(ratings)) == 1:
        _tell("All ratings of a Group from Images are equal: it teaches nothing which picture is better.")


@functools.lru_cache(maxsize=64)
def _tell(text: str) -> None:
    _log.warning("DGPO: %s", text)
