"""Rewards: what the images are scored by.

Whoever writes one derives from `Reward` here; a new one of this package is one file and one line in `registry.REWARDS`.
"""

from dgpo_core.rewards.base import AUTOMATIC, WEIGHTS_FILE, EditReward, GroupReward, Reward
from dgpo_core.rewards.registry import (
    REWARDS,
    check_cheaply,
    chosen_file,
    is_file,
    known_rewards,
    make_reward,
    refuse_files,
    require_reward,
    reward_class,
    weights_of,
)
from dgpo_core.rewards.scoring import Scoring, score_groups

__all__ = [
    "AUTOMATIC",
    "REWARDS",
    "WEIGHTS_FILE",
    "EditReward",
    "GroupReward",
    "Reward",
    "Scoring",
    "check_cheaply",
    "chosen_file",
    "is_file",
    "known_rewards",
    "make_reward",
    "refuse_files",
    "require_reward",
    "reward_class",
    "score_groups",
    "weights_of",
]
