"""How long the threads of a command wait for each other awake.

A small model computes in thousands of short parallel loops. GNU's OpenMP, which torch on Linux computes with, has a
thread that is done spin for some milliseconds before it sleeps; where another program takes one of the cores, that is
the core that the thread it waits for would need, again and again: on two cores an iteration of the quickstart took 31
times as long. A short spin costs next to nothing on a quiet machine, and changes no result.
"""

import sys
from collections.abc import MutableMapping, Sequence
from itertools import pairwise

SPINS = "1000"
"""Rounds of the waiting loop; GNU's own number is 300,000 unless a policy is chosen."""

CHOSEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Who sets one of these has chosen."""


def wait_briefly(arguments: Sequence[str], environment: MutableMapping[str, str]) -> None:
    """Where a command of this package is what the interpreter was started for, its threads soon sleep while they wait.

    To be called before torch is loaded, which reads it once. arguments: those of the interpreter. Of a program that
    only imports the package, such as ComfyUI, the environment stays as it is.
    """
    ours = any(flag == "-m" and module.split(".")[0] == "dgpo_core" for flag, module in pairwise(arguments))
    if ours and "torch" not in sys.modules and not any(name in environment for name in CHOSEN):
        environment["GOMP_SPINCOUNT"] = SPINS
