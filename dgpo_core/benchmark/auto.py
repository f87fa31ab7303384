"""Before a run: what its settings leave open, by the memory that is free on the accelerator now."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dgpo_core.common.distributed import World
from dgpo_core.settings.config import Config
from dgpo_core.settings.resuming import left_open


def decided(config: Config, world: World, tell: Callable[[str], None]) -> Config:
    """The settings with what they leave open, told in one line; as they are where there is no CUDA device.

    All processes decide by the one that has the least memory free, for its kind of card. Raises UserError where not
    even the smallest choice fits.
    """
    if not left_open(config) or world.device.type != "cuda":
        return config
    from dgpo_core.benchmark.choose import choose_for  # imported late: it takes seconds

    mine = torch.cuda.mem_get_info(world.device)[0], torch.cuda.get_device_name(world.device)
    free, card = min(world.gather([mine]))
    choice = choose_for(config, free, card)
    if world.leads:
        tell(choice.said)
    return choice.config
