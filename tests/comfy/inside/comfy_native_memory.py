"""Run by `test_native_memory.py` in ComfyUI's folder and interpreter: what is alive over 50 iterations."""

from __future__ import annotations

import gc
import json
import tempfile
from typing import Any

# isort: split
from comfy_native_case import Case
from comfy_native_node import execute, sessions, step

# isort: split
import comfy.model_management
import folder_paths
import psutil
import torch
from bright import register
from torch import Tensor
from torch.nn import Parameter

ITERATIONS, WARM = 50, 10


def alive() -> dict[str, int]:
    """Tensors and their bytes (shared memory once), models that ComfyUI has loaded, and the process's memory."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return {
        "tensors": len(tensors),
        "bytes": sum(storages.values()),
        "models": len(comfy.model_management.current_loaded_models),
        "process": psutil.Process().memory_info().rss,
    }


def iterate(case: Case) -> dict[str, Any]:
    """Iterations by the steps that nodes take, each with a picture of KSampler's after it."""
    handle, counts = execute(case), {}
    before = case.drawn()
    for iteration in range(ITERATIONS):
        handle, _ = step(sessions.resolve(handle, iteration), iteration)
        same = torch.equal(case.drawn(), before)
        assert same, f"another picture after iteration {iteration}"
        if iteration + 1 in (WARM, ITERATIONS):
            counts[iteration + 1] = alive()
    return {"step": handle.step, "warm": counts[WARM], "end": counts[ITERATIONS]}


def main() -> None:
    torch.set_num_threads(1)
    register()
    with tempfile.TemporaryDirectory() as name:
        folder_paths.set_output_directory(name)
        found = iterate(Case("sd3"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
