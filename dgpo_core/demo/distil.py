"""Make the embedded model's few-step LoRA: `python -m dgpo_core.demo.distil [--output FILE]`.

The embedded model is its own teacher. It draws trajectories in many small Euler steps; between two noise levels of the
student the trajectory is a straight line, whose slope the LoRA learns to predict in one go (progressive distillation,
arXiv 2202.00512, with all halvings at once). What it then predicts from pure noise is where *this* noise leads, and no
longer the mean over all pictures, as in every model that was made for few steps.
"""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from dgpo_core.common.prompts import load_prompts
from dgpo_core.common.seeds import derive_seed, noise
from dgpo_core.policy import load_policy
from dgpo_core.policy.base import Cond
from dgpo_core.policy.pipeline import DiffusersPolicy

HERE = Path(__file__).parent
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
          "net.0.proj", "net.2", "norm1.linear", "norm1_context.linear", "proj_out", "norm_out.linear")  # fmt: skip


@dataclass(frozen=True)
class DistilConfig:
    """How the few-step LoRA is made."""

    output: Path = HERE / "lora_2steps.safetensors"
    """The LoRA file."""
    student_steps: int = 2
    """Euler steps that the student takes."""
    substeps: int = 12
    """Steps of the teacher for one of the student's."""
    trajectories: int = 4_000
    """Trajectories of the teacher that the student learns from."""
    steps: int = 900
    """Optimiser steps."""
    batch: int = 64
    """Samples per optimiser step."""
    rank: int = 32
    """Rank of the LoRA."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    seed: int = 0
    """Seed of trajectories and training."""


def levels_of(policy: DiffusersPolicy, steps: int) -> Tensor:
    """The noise levels of `steps` Euler steps, from 1 down to 0, [steps + 1]."""
    timesteps = policy.solver("euler", steps, *policy.default_size).timesteps
    return torch.cat([policy.prediction.level(timesteps), torch.zeros(1)])


@torch.no_grad()
def trajectories(policy: DiffusersPolicy, conds: Cond, levels: Tensor, substeps: int, seed: int) -> Tensor:
    """Where the teacher is at each of the student's levels: [N, steps, C, h, w], one row for each conditioning."""
    shape = policy.latent_shape(*policy.default_size)
    x = torch.stack([noise(derive_seed(seed, "trajectory", i), shape) for i in range(len(conds))])
    states = [x]
    for high, low in zip(levels[:-2].tolist(), levels[1:-1].tolist(), strict=True):  # the last step is next to nothing
        path = torch.linspace(high, low, substeps + 1).tolist()
        for here, there in itertools.pairwise(path):
            parts = []
            for index in torch.arange(len(x)).split(256):
                t = torch.full((len(index),), here * policy.prediction.num_train_timesteps)
                parts.append(policy.predict(x[index], t, conds.select(index)))
            x = x + (there - here) * torch.cat(parts)
        states.append(x)
    return torch.stack(states, dim=1)


def distil(policy: DiffusersPolicy, conds: Cond, states: Tensor, levels: Tensor, config: DistilConfig) -> None:
    """Trains "current" to go from each level to the next in one step."""
    parameters = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "distil"))
    start, losses = time.monotonic(), []
    for step in range(1, config.steps + 1):
        rows = torch.randint(len(states), (config.batch,), generator=generator)
        k = torch.randint(states.shape[1] - 1, (config.batch,), generator=generator)
        high, low = levels[k], levels[k + 1]
        x_t, target = states[rows, k], (states[rows, k] - states[rows, k + 1]) / (high - low)[:, None, None, None]
        with policy.using("current"):
            predicted = policy.predict(x_t, high * policy.prediction.num_train_timesteps, conds.select(rows))
            loss = (predicted - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        losses.append(loss.item())
        if step % 50 == 0:
            mean = sum(losses[-50:]) / 50
            print(f"distil {step}/{config.steps}  loss {mean:.4f}  {time.monotonic() - start:.0f} s", flush=True)


def main(config: DistilConfig) -> None:
    """Draw the teacher's trajectories, train the student, save its LoRA."""
    torch.set_num_threads(1)
    policy = load_policy(HERE / "model", rank=config.rank, alpha=config.rank, targets=LAYERS, seed=config.seed)
    prompts = [prompt.text for prompt in load_prompts(HERE / "train.jsonl")]
    conds = Cond.cat(policy.encode([prompts[i % len(prompts)] for i in range(config.trajectories)]))
    levels = levels_of(policy, config.student_steps)
    start = time.monotonic()
    with policy.using(None):
        states = trajectories(policy, conds, levels, config.substeps, config.seed)
    print(f"drew {config.trajectories} trajectories in {time.monotonic() - start:.0f} s", flush=True)
    distil(policy, conds, states, levels, config)
    policy.save_lora(config.output, {"modelspec.title": f"DGPO embedded model, {config.student_steps} steps"})
    print(f"saved {config.output}")


if __name__ == "__main__":
    main(tyro.cli(DistilConfig, description=__doc__))
