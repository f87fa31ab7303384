"""The two moving averages of the adapter: a fast one (the "old" policy) and a slow one (evaluated and saved)."""

from collections.abc import Mapping

import torch
from torch import Tensor


def fast_decay(step: int, limit: float, rate: float) -> float:
    """min(limit, rate * step), step counted from 0: the fast EMA starts as a copy of the current weights and slows down
    (official code)."""
    return min(limit, rate * step)


@torch.no_grad()
def ema_(average: Mapping[str, Tensor], current: Mapping[str, Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * current, in place."""
    for key, value in average.items():
        if decay == 0.0:
            value.copy_(current[key])
        else:
            value.lerp_(current[key], 1.0 - decay)
