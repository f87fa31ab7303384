"""DGPO (arXiv 2510.08425) as the engine has it: its own trainer with the quickstart's settings."""

from collections.abc import Mapping, Sequence

from dgpo_core.common.prompts import Prompt
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy.base import Policy
from dgpo_core.rewards import Reward
from dgpo_core.settings.config import Config


class DGPO:
    """Everything is the engine's. lr: as `Rival` has it; the quickstart's own is 1e-3."""

    what, lr = "DGPO", 2e-3

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        rewards: Mapping[str, Reward],
        config: Config,
        size: tuple[int, int],
    ) -> None:
        self.trainer = Trainer(policy, prompts, rewards, config, size=size)

    def iterate(self) -> None:
        """One iteration of the engine's."""
        self.trainer.iterate()
