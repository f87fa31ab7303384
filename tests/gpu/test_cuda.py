"""What only a GPU can show: `pytest tests/gpu` where there is one, without a network; skipped elsewhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bright
import pytest
import tiny
import torch
from engine import PROMPTS, SIZE, everything, quick, snapshot

from dgpo_core import train
from dgpo_core.benchmark.iteration import count_without_weights
from dgpo_core.benchmark.random_model import random_policy
from dgpo_core.benchmark.weightless import META
from dgpo_core.method.iteration import Iteration
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy import load_policy
from dgpo_core.policy.families import FAMILIES
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.settings.shipped import DEMO

pytestmark = pytest.mark.gpu
CUDA = "cuda"


def trainer_on(policy: DiffusersPolicy, config: Any, size: tuple[int, int] = SIZE, **options: Any) -> Trainer:
    return Trainer(policy, PROMPTS, {"bright": bright.Bright()}, config, size=size, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_iteration_draws_and_compares_as_on_a_cpu(family: str) -> None:
    def first(device: str) -> Iteration:
        policy = load_policy(tiny.folder(family), rank=4, alpha=8.0, dtype="float32", device=device)
        return trainer_on(policy, quick(), policy.default_size).iterate()

    there, here = first(CUDA), first("cpu")
    for ours, theirs in zip(there.groups, here.groups, strict=True):
        # convolutions may round to 10 bits (TF32), which the solver carries on
        assert torch.allclose(ours.images, theirs.images, atol=0.02)
    assert there.metrics["loss"] == pytest.approx(here.metrics["loss"], rel=0.05, abs=1e-3)
    assert there.metrics["grad_norm"] == pytest.approx(here.metrics["grad_norm"], rel=0.2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_base_in_bfloat16_trains(family: str, recompute: bool) -> None:
    policy = load_policy(tiny.folder(family), rank=4, alpha=8.0, dtype="bfloat16", device=CUDA)
    if recompute:
        policy.enable_gradient_checkpointing()
    before = everything(policy)
    trainer = trainer_on(policy, quick(), policy.default_size)
    for _ in range(2):
        assert 0 < trainer.iterate().metrics["grad_norm"] < float("inf")
    assert not torch.equal(everything(policy), before)
    assert everything(policy).isfinite().all()


def test_a_training_comes_back_as_it_was_left() -> None:
    policy = load_policy(tiny.folder("sd3"), rank=4, alpha=8.0, device=CUDA)
    trainer = trainer_on(policy, quick())
    trainer.iterate()
    tensors, info = snapshot(trainer)
    again = trainer_on(policy, quick())
    trainer.iterate()
    again.step.load_state({name: tensor.cpu() for name, tensor in tensors.items()}, info)
    restored, known = snapshot(again)
    assert known == info
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name].cpu(), tensors[name].cpu()) for name in tensors)


@pytest.fixture
def little_memory() -> Iterator[Any]:
    """Limits what this process may take of the GPU, in bytes."""
    whole = torch.cuda.get_device_properties(0).total_memory
    yield lambda limit: torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole))
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_where_memory_runs_out_smaller_batches_give_the_same_loss(little_memory: Any) -> None:
    policy = load_policy(DEMO / "model", rank=8, alpha=16.0, dtype="float32", device=CUDA)
    config = quick(rollout={"group_size": 64, "batch": 0}, training={"micro_batch": 256, "clip": 0.0})
    start = snapshot(trainer_on(policy, config, policy.default_size))
    torch.cuda.reset_peak_memory_stats()
    plenty = trainer_on(policy, config, policy.default_size).iterate()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    here = torch.cuda.memory_reserved()
    told: list[str] = []
    small = trainer_on(policy, config, policy.default_size, tell=told.append)
    small.step.load_state(*start)
    little_memory(here + (peak - here) * 0.5)
    done = small.iterate()
    assert any("Out of memory" in line for line in told), told
    assert done.metrics["loss"] == pytest.approx(plenty.metrics["loss"], rel=1e-3)


def test_a_run_goes_on_after_its_end_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = ["--preset", "quickstart", "--model.device", CUDA, "--name", "a", "--checkpoint.every", "1"]
    run += ["--evaluation.every", "0", "--evaluation.images", "20", "--evaluation.final_images", "20"]
    assert train.main([*run, "--iterations", "2"]) == 0
    assert train.main([*run, "--iterations", "3", "--resume"]) == 0
    assert (tmp_path / "runs" / "a" / "lora.safetensors").is_file()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_memory_that_is_counted_is_the_memory_that_is_taken(recompute: bool) -> None:
    size = (512, 512)
    config = quick(
        rollout={"batch": 4},
        training={"micro_batch": 4},
        memory={"gradient_checkpointing": recompute},
        lora={"rank": 8},
    )

    def built(device: Any) -> DiffusersPolicy:
        lora: dict[str, Any] = {"rank": 8, "alpha": 8.0, "dropout": 0.0, "targets": None}
        policy = random_policy("sd15", device=device, dtype="bfloat16", seed=0, offload=False, **lora)
        if recompute:
            policy.enable_gradient_checkpointing()
        return policy

    counted = max(phase.bytes for phase in count_without_weights(built(META), config, size).values())
    trainer = trainer_on(built(torch.device(CUDA)), config, size)
    for _ in range(2):
        trainer.iterate()
    torch.cuda.reset_peak_memory_stats()
    trainer.iterate()
    assert torch.cuda.max_memory_allocated() == pytest.approx(counted, rel=0.1)
