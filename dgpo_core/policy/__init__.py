"""Policies: one class per model family, found by name. A new family is one file and one line in FAMILIES."""

from dgpo_core.policy.base import AdapterName, Cond, Policy, guided
from dgpo_core.policy.families import FAMILIES
from dgpo_core.policy.loading.limits import image_limits
from dgpo_core.policy.loading.load import family_of, load_policy

__all__ = ["FAMILIES", "AdapterName", "Cond", "Policy", "family_of", "guided", "image_limits", "load_policy"]
