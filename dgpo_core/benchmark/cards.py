"""Cards that people have, and how long counted work takes on one.

A kernel takes as long as its arithmetic or its memory, whichever is longer; a phase takes as long as its kernels, as
the program that starts them, or as what comes over the bus meanwhile. What a card reaches of its published figures is
assumed: see `SHARE`, `BANDWIDTH`, `BUS` and `START`, and README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dgpo_core.benchmark.count import Kernel
from dgpo_core.common.errors import UserError
from dgpo_core.common.suggest import suggest


@dataclass(frozen=True)
class Card:
    """Published figures. memory: GiB; half, single, eighth: TFLOP/s of dense products in 16 bits with float32 sums, in
    float32, and in 8-bit floats (0: it has none); bandwidth: GB/s; bus: GB/s one way between main memory and card."""

    name: str
    memory: float
    half: float
    single: float
    bandwidth: float
    eighth: float = 0.0
    bus: float = 31.5  # PCIe 4.0 with 16 lanes


# NVIDIA's white papers on GA102 (RTX 3090), Ada (RTX 4080, 4090), RTX Blackwell (RTX 5090), A100 and H100, and the data
# sheet of the L4: dense figures, 16-bit products with float32 sums; where there are sparse ones only, half of them. For
# the RTX 3060, 4060 Ti and 4070: twice the published float32 figure, as it is for all others of these two generations.
_KNOWN = (
    Card("RTX 3060", 12, 25.5, 12.7, 360),
    Card("RTX 3090", 24, 71.2, 35.6, 936),
    Card("RTX 4060 Ti", 16, 44.1, 22.1, 288, 88.2, bus=15.8),
    Card("RTX 4070", 12, 58.3, 29.1, 504, 116.6),
    Card("RTX 4080", 16, 97.5, 48.7, 717, 194.9),
    Card("RTX 4090", 24, 165.2, 82.6, 1008, 330.3),
    Card("RTX 5090", 32, 209.5, 104.8, 1792, 419.0, bus=63.0),
    Card("L4", 24, 121.0, 30.3, 300, 242.0),
    Card("A100", 80, 312.0, 19.5, 2039),
    Card("H100", 80, 989.4, 66.9, 3350, 1978.9, bus=63.0),
)

CARDS: Mapping[str, Card] = {card.name: card for card in _KNOWN}
"""By name. The RTX 4060 Ti is the one of 16 GB, the A100 that of 80 GB with SXM, the H100 that with SXM."""

SHARE = 0.4
"""Of the published arithmetic: what products of matrices and convolutions reach."""
BANDWIDTH = 0.7
"""Of the published bandwidth: what all other operations reach."""
BUS = 0.7
"""Of the published rate of the bus: what copies from pinned memory reach. Nobody has measured it here."""
START = 35e-6
"""Seconds until Python starts the next kernel. On an H100 with too little to do, a forward of SD3.5-M took 83 ms for
its 2,804 kernels, and a forward and backward with checkpointing 442 ms for 11,893."""


def find_card(name: str) -> Card:
    """The card of this name, however it is written. Raises UserError, with the known ones, where there is none."""
    plain = {_plain(known): card for known, card in CARDS.items()}
    wanted = _plain(name)
    for known, card in plain.items():
        if wanted == known or wanted == known.removeprefix("rtx"):
            return card
    raise UserError(f"There is no card {name} in the table; known: {', '.join(CARDS)}{_near(name)}")


def _near(name: str) -> str:
    hint = suggest(name, CARDS)
    return hint if "did you mean" in hint else "."


def _plain(name: str) -> str:
    plain = name.lower().replace("geforce", "").replace("nvidia", "")
    return "".join(letter for letter in plain if letter.isalnum()).removesuffix("gb")


def seconds(kernels: Mapping[Kernel, int], card: Card) -> float:
    """How long the kernels take on the card."""
    return max(busy(kernels, card), waiting(kernels, card))


def busy(kernels: Mapping[Kernel, int], card: Card) -> float:
    """How long the card would work on the kernels, if all were started in time."""
    return sum(times * _kernel(kernel, card) for kernel, times in kernels.items() if not kernel.crosses)


def waiting(kernels: Mapping[Kernel, int], card: Card) -> float:
    """How long it takes until all kernels are started and all that they need has crossed the bus, whatever the card has
    to do: no longer for larger batches."""
    crossing = sum(times * kernel.moved / 2 for kernel, times in kernels.items() if kernel.crosses)  # read and written
    return max(START * sum(kernels.values()), crossing / (BUS * card.bus * 1e9))


def _kernel(kernel: Kernel, card: Card) -> float:
    rate = {32: card.single, 16: card.half, 8: card.eighth or card.half}.get(kernel.bits, card.single)
    return max(kernel.flops / (SHARE * rate * 1e12), kernel.moved / (BANDWIDTH * card.bandwidth * 1e9))
