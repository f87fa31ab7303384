"""What the families share whose prompts are read by a language model: as many tokens as the prompt has, and a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from dgpo_core.common.sending import sent


def mask_of(tokens: Tensor) -> Tensor:
    """The mask of one prompt's tokens [1,L,C], all of which count: [1,L], on the CPU, where `Cond.to` leaves it.
    `Cond.cat` fills it up beside the tokens."""
    return torch.ones(tokens.shape[:2], dtype=torch.bool)


def lengths(mask: Tensor) -> list[int]:
    """How many tokens of each row count, by a mask [B,L] that is true up to some place."""
    counts: list[int] = mask.sum(1).tolist()
    return counts


def by_length(mask: Tensor) -> list[tuple[int, list[int]]]:
    """The rows of a mask [B,L] by how many of their tokens count, the longest first."""
    rows: dict[int, list[int]] = {}
    for row, length in enumerate(lengths(mask)):
        rows.setdefault(length, []).append(row)
    return sorted(rows.items(), reverse=True)


def unless_whole(mask: Tensor, device: torch.device) -> Tensor | None:
    """The mask [B,L] on a device, or None where all tokens count: attention without a mask has the faster kernels."""
    return None if bool(mask.all()) else sent(mask, device)
