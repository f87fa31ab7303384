"""Three LoRA adapters on one frozen network: "current" (trained), "old" (fast EMA) and "ema" (slow EMA).

Here is what holds on every engine: their parameters, and which of them is on. How a network comes to use them, its
engine's class says: `PeftAdapters` for diffusers' networks, `LoraBank` for those that belong to somebody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from dgpo_core.common.errors import UserError
from dgpo_core.policy.base import AdapterName
from dgpo_core.policy.dropout import Dropout

NAMES: tuple[AdapterName, ...] = ("current", "old", "ema")


class Adapters:
    """The parameters of the three adapters, float32, and which of them is on: "current" at first.

    states: of each adapter `<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight` [out, rank] of every
    module, the same keys for all three. alpha: the branch is scaled by alpha / rank. dropout 0..1: share of a branch's
    input that "current" does not see while it trains.
    """

    def __init__(
        self, states: Mapping[AdapterName, Mapping[str, Parameter]], *, rank: int, alpha: float, dropout: float
    ) -> None:
        self.rank, self.alpha, self.dropout = rank, alpha, Dropout(dropout)
        self._states = states
        self._active: AdapterName | None = "current"

    @property
    def scale(self) -> float:
        """What the branch is multiplied by."""
        return self.alpha / self.rank

    @property
    def active(self) -> AdapterName | None:
        """The adapter that forwards use now; None: the base alone."""
        return self._active

    def state(self, name: AdapterName) -> dict[str, Parameter]:
        """The live parameters of one adapter: `<module>.lora_A.weight`, `<module>.lora_B.weight`."""
        return dict(self._states[name])

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copies the tensors (keys of `state`, all of them) into all three adapters."""
        with torch.no_grad():
            for own in self._states.values():
                for key, parameter in own.items():
                    parameter.copy_(state[key])

    @contextmanager
    def using(self, name: AdapterName | None) -> Iterator[None]:
        """Switches for the length of the block, then back to what was active before."""
        before = self._active
        self._activate(name)
        try:
            yield
        finally:
            self._activate(before)

    def dropping(self, seeds: Sequence[int]) -> AbstractContextManager[None]:
        """Inside the block the dropout of "current" is on, with masks from one seed a row."""
        return self.dropout.dropping(seeds)

    def _activate(self, name: AdapterName | None) -> None:
        """An engine whose network looks elsewhere writes it there, too."""
        self._active = name


def check_settings(rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> None:
    """Raises UserError for a number out of range and where there are no targets."""
    if rank < 1:
        raise UserError(f"The LoRA rank must be at least 1, not {rank}.")
    if not alpha > 0:
        raise UserError(f"The LoRA alpha must be above 0, not {alpha}.")
    if not 0 <= dropout < 1:
        raise UserError(f"The LoRA dropout must be at least 0 and below 1, not {dropout}.")
    if not targets:
        raise UserError("The LoRA has no target modules: leave `targets` out for the default or name some.")
