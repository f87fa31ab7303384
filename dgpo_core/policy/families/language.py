"""What the families share whose prompts are read by a language model: as many tokens as the prompt has, and a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_of(tokens: Tensor) -> Tensor:
    """The mask of one prompt's tokens [1,L,C], all of which count: [1,L]. `Cond.cat` fills it up beside the tokens."""
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def lengths(mask: Tensor) -> list[int]:
    """How many tokens of each row count, by a mask [B,L] that is true up to some place."""
    if mask.is_meta:  # without storage nothing is known of it but its size
        return [mask.shape[1]] * len(mask)
    counts: list[int] = mask.sum(1).tolist()
    return counts


def by_length(mask: Tensor) -> list[tuple[int, list[int]]]:
    """The rows of a mask [B,L] by how many of their tokens count, the longest first."""
    rows: dict[int, list[int]] = {}
    for row, length in enumerate(lengths(mask)):
        rows.setdefault(length, []).append(row)
    return sorted(rows.items(), reverse=True)


def unless_whole(mask: Tensor) -> Tensor | None:
    """The mask [B,L], or None where all tokens count: attention without a mask has the faster kernels."""
    return None if mask.is_meta or bool(mask.all()) else mask
