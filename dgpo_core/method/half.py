"""The backward of a network that computes in float16: its gradient scaled up, so that it does not vanish.

What float16 holds ends at 6e-8. The loss of an update is a mean over all numbers of all samples of an iteration: its
derivative by one of them is some 1e-8 for images of 1024 pixels, rounded to zero before it reaches a layer. bfloat16
has the range of float32 and needs none of this.
"""

import math

import torch

HEADROOM = 2**-3
"""Of what would make the derivatives of samples of advantage 1 about as large as the predictions' errors."""

STEP = 2.0**6
"""What the scale is divided by where a gradient came out infinite."""


def loss_scale(dtype: torch.dtype, numbers: float) -> float:
    """What to multiply the loss by before its backward, a power of two: 1 but for float16.

    numbers: what one squared error was divided by on its way into the loss.
    """
    if dtype != torch.float16:
        return 1.0
    return max(1.0, 2.0 ** math.floor(math.log2(max(numbers, 1.0) * HEADROOM)))


def smaller(scale: float) -> float:
    """The next scale to try, at least 1."""
    return max(1.0, scale / STEP)
