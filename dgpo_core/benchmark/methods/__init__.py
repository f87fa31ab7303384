"""The methods that DGPO is compared with, each in a file with its equations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from dgpo_core.benchmark.methods.awm import AWM
from dgpo_core.benchmark.methods.dgpo import DGPO
from dgpo_core.benchmark.methods.flow_awr import FlowAWR
from dgpo_core.benchmark.methods.flow_grpo import FlowGRPO, FlowGRPOFast
from dgpo_core.benchmark.methods.nft import DiffusionNFT
from dgpo_core.benchmark.methods.rival import Rival
from dgpo_core.benchmark.methods.v_grpo import VGRPO
from dgpo_core.common.prompts import Prompt
from dgpo_core.policy.base import Policy
from dgpo_core.rewards import Reward
from dgpo_core.settings.config import Config


class Iterating(Protocol):
    """A method at work."""

    def iterate(self) -> None:
        """One iteration."""


Entrant = Callable[[Policy, Sequence[Prompt], Mapping[str, Reward], Config, tuple[int, int]], Iterating]
"""What makes one: from a policy, prompts, rewards, settings and the (height, width) of images."""

METHODS: Mapping[str, type[DGPO] | type[Rival]] = {
    "dgpo": DGPO,
    "nft": DiffusionNFT,
    "awm": AWM,
    "v_grpo": VGRPO,
    "flow_awr": FlowAWR,
    "flow_grpo_fast": FlowGRPOFast,
    "flow_grpo": FlowGRPO,
}
"""By the name that the command knows them by."""
