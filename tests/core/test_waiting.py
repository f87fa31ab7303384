"""What the processor waits for, while an accelerator could go on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine import accumulate, make_tasks, moved, quick
from torch.utils._python_dispatch import TorchDispatchMode

from dgpo_core.policy.pipeline import DiffusersPolicy

pytestmark = pytest.mark.slow


class Waits(TorchDispatchMode):
    """Counts the numbers that the processor asks of tensors, for each of which it waits until they are computed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_micro_batch_is_waited_for(policy: DiffusersPolicy) -> None:
    moved(policy, "current", seed=1)
    moved(policy, "old", seed=2)
    settings = replace(quick().training, kl_weight=0.1, clip=1e-3)
    tasks, counts = make_tasks(policy), []
    for micro_batch in (1, 2, 4):
        with Waits() as waits:
            accumulate(policy, tasks, settings, micro_batch)
        counts.append(waits.count)
    assert len(set(counts)) == 1
