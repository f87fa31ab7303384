"""Every random number of a run comes from a seed that is a pure function of what it is for.

No generator is carried from step to step, so a resumed run, a run split over processes and a sample drawn alone all see
the same noise.
"""

import hashlib

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A stable seed in [0, 2**63) for the thing that `parts` name, e.g. `derive_seed(run_seed, "rollout", 3, 0)`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of `shape` for one sample, drawn on the CPU so that it is the same on every device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
