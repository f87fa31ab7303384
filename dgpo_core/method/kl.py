"""The weight of the KL term where a target is set: it is steered so that the distance to the base stays there."""

from dgpo_core.settings.config import TrainingConfig

LEAST = 1e-4
"""From where the weight grows where `kl_weight` is 0."""

CALM = 0.3
"""The distance follows the weight some steps behind: at 1 it swung by ten times around its target; so it settles."""

FASTEST = 2.0
"""The weight is at most multiplied, or divided, by this in a step."""


def first_weight(settings: TrainingConfig) -> float:
    """The KL term's weight in the first step."""
    return max(settings.kl_weight, LEAST) if settings.kl_target else settings.kl_weight


def next_weight(settings: TrainingConfig, weight: float, distance: float | None) -> float:
    """The weight of the next step: w (d / target)^0.3, at most twice and at least half of w.

    After the adaptive penalty of PPO (arXiv 1707.06347, section 4), in proportion. It does not fall below the first
    one. distance: the mean (f - f_base)^2 of the step just taken; None where the base was not asked.
    """
    if distance is None:
        return weight
    factor = (distance / settings.kl_target) ** CALM
    return max(first_weight(settings), weight * min(max(factor, 1 / FASTEST), FASTEST))
