"""How long a compiled native policy takes beside the same as it is: run it in ComfyUI's folder and interpreter.

`python <this file> --cpu` makes a Wan of 4 blocks and width 512 with random weights in float32, lets torch.compile make
machine code of its blocks (minutes, a C++ compiler), and prints the ratio of processor time for forwards without
gradient and for those with their backward: one with and one without the compiler by turns, in one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import comfy_native_models as models  # first: it finds ComfyUI

# isort: split
import comfy_native_case
import torch

SIDE, ROWS, ROUNDS = 32, 2, 15


def made() -> tuple[Any, Any, Any]:
    """A case of the network, a policy on it, and one that is compiled, with the same adapters."""
    models.WAN.update(dim=512, num_heads=8, ffn_dim=2048, num_layers=4)
    models.SIDE = comfy_native_case.SIDE = SIDE
    case = comfy_native_case.Case("wan")
    plain, fast = case.policy(), case.policy()
    fast.compile()
    for policy in (plain, fast):
        comfy_native_case.randomise(policy)
    return case, plain, fast


def seconds(policy: Any, work: Callable[[Any], None]) -> float:
    """Of the processor; which of the policies is on the network is changed before."""
    policy.load()
    start = time.process_time()
    work(policy)
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    case, plain, fast = made()
    x, t, weights = (value[:ROWS] for value in case.inputs())

    def forward(policy: Any) -> None:
        with torch.no_grad():
            policy.predict(x, t, policy.encode(["red"])[0].expand(ROWS))

    def both(policy: Any) -> None:
        (policy.predict(x, t, policy.encode(["red"])[0].expand(ROWS)) * weights).sum().backward()

    for name, work in (("forward", forward), ("forward and backward", both)):
        for policy in (plain, fast):
            work(policy)
        pairs = [(seconds(plain, work), seconds(fast, work)) for _ in range(ROUNDS)]
        low, middle, high = statistics.quantiles([after / before for before, after in pairs], n=4)
        print(f"{name}: {middle:.3f} of the time (quartiles {low:.3f} to {high:.3f}, {ROUNDS} pairs)")


if __name__ == "__main__":
    main()
