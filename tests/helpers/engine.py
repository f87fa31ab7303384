"""What the engine's tests share: quick settings for the tiny SD3, and ways to look inside a trainer and an update."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bright
import pytest
import torch
from torch import Tensor

from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.seeds import noise
from dgpo_core.method.rollout import nothing
from dgpo_core.method.trainer import Trainer
from dgpo_core.method.update import Tally, Task, Update
from dgpo_core.policy import Cond
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.settings.config import Config, TrainingConfig
from dgpo_core.settings.values import from_dict
from dgpo_core.settings.yaml_file import to_yaml

SIZE = (16, 16)  # latents of 8 x 8: 16 tokens
PROMPTS = [Prompt("red"), Prompt("blue")]
TIMESTEPS = (900.0, 700.0, 400.0)
QUICK: dict[str, Any] = {
    "name": "test",
    "iterations": 3,
    "reward": "bright",
    "model": {"height": SIZE[0], "width": SIZE[1], "device": "cpu"},
    "lora": {"rank": 4, "alpha": 8.0},
    "data": {"groups_per_iteration": 2},
    "rollout": {"solver": "euler", "steps": 3, "cfg": 1.0, "group_size": 4, "batch": 0},
    "training": {"timesteps": 2, "t_min": 0.0, "micro_batch": 64, "lr": 1e-2, "kl_weight": 0.01, "ema_slow_every": 1},
    "evaluation": {"every": 2, "images": 4, "final_images": 6, "batch": 0, "steps": 3, "cfg": 1.0},
    "checkpoint": {"every": 1},
    "memory": {"gradient_checkpointing": False, "offload": False},
}


def quick(**changes: Any) -> Config:
    """`QUICK` with changes: `quick(iterations=2, training={"lr": 1e-3})`."""
    return from_dict(changes, from_dict(QUICK))


def write_quick(folder: Path, model: Path, **changes: Any) -> list[str]:
    """Puts `quick` settings and prompts into `folder`; the arguments of a training that is started there.

    Paths are relative to it: two such folders hold the same settings, and the same run in each ends in the same bytes.
    """
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("red\nblue\nred blue\n")
    (folder / "held_out.txt").write_text("blue red\nred red\n")
    where = {"output": "runs", "model": {"path": str(model)}}
    data = {"prompts": "prompts.txt", "held_out": "held_out.txt"}
    config = from_dict({"data": data}, from_dict(where, quick(**changes)))
    (folder / "quick.yaml").write_text(to_yaml(config))
    return ["--config", "quick.yaml"]


class Calls(list[tuple[str | None, int, bool]]):
    """Every forward of a policy, as (adapter, rows, whether it had gradients)."""

    def __init__(self, policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        real = policy.predict

        def predict(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            self.append((policy.adapters.active, len(x_t), torch.is_grad_enabled()))
            return real(x_t, t, cond)

        monkeypatch.setattr(policy, "predict", predict)

    def adapters(self) -> set[str | None]:
        """Which adapters were used."""
        return {adapter for adapter, _, _ in self}

    def rows(self, adapter: str | None) -> int:
        """Rows in all that went through an adapter."""
        return sum(n for name, n, _ in self if name == adapter)


def make_trainer(
    policy: DiffusersPolicy, config: Config, prompts: Sequence[Prompt] = PROMPTS, **options: Any
) -> Trainer:
    """A trainer of the tiny model on the rewards of `bright.py` that `config` names."""
    rewards = {term.name: getattr(bright, bright.NAMES[term.name].partition(":")[2])() for term in config.reward}
    return Trainer(policy, prompts, rewards, config, size=SIZE, **options)


def moved(policy: DiffusersPolicy, name: str, seed: int, size: float = 0.3) -> None:
    """Gives an adapter random weights, so that it differs from the others and from the base."""
    with torch.no_grad():
        for i, (key, parameter) in enumerate(sorted(policy.adapter_state(name).items())):
            if key.endswith("lora_B.weight"):
                parameter.copy_(size * noise(1000 * seed + i, tuple(parameter.shape)))


def snapshot(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A copy of a trainer's state, which itself is the live tensors."""
    tensors, info = trainer.step.state()
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}, info


def weights(policy: DiffusersPolicy, name: str) -> Tensor:
    """All numbers of an adapter in one row, a copy."""
    return flat(policy.adapter_state(name))


def everything(policy: DiffusersPolicy) -> Tensor:
    """The numbers of all three adapters in one row, a copy."""
    return torch.cat([weights(policy, name) for name in ("current", "old", "ema")])


def learned(trainer: Trainer) -> Tensor:
    """Adapters and optimiser in one row, a copy."""
    return flat({name: tensor for name, tensor in trainer.step.state()[0].items() if not name.startswith("rng/")})


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensors one after the other, a copy."""
    return torch.cat([tensors[key].detach().flatten() for key in sorted(tensors)]).clone()


def gradient(policy: DiffusersPolicy) -> Tensor:
    """The gradient of the current adapter in one row, which is then forgotten."""
    found = flat({k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in policy.trainable().items()})
    for parameter in policy.trainable().values():
        parameter.grad = None
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """How far a is from b, relative to b."""
    return float((a - b).norm() / b.norm())


def make_tasks(policy: DiffusersPolicy, G: int = 4, timesteps: Sequence[float] = TIMESTEPS[:2]) -> list[Task]:
    """Two groups of G random latents, each at the timesteps."""
    tasks = []
    for g, prompt in enumerate(PROMPTS):
        latents = torch.stack([noise(100 * g + i, policy.latent_shape(*SIZE)) for i in range(G)])
        group = Group(prompt, tuple(range(G)), latents, torch.zeros(G, 3, *SIZE))
        A = noise(7 + g, (G,))
        A = (A - A.mean()) / A.std()
        (cond,) = policy.encode([prompt.text])
        tasks += [Task(group, A, cond, t, noise_seed=50 + 10 * g + m) for m, t in enumerate(timesteps)]
    return tasks


def accumulate(
    policy: DiffusersPolicy,
    tasks: Sequence[Task],
    settings: TrainingConfig,
    micro_batch: int = 64,
    *,
    uncond: Cond | None = None,
    old_is_current: bool = False,
) -> tuple[Tensor, Tally]:
    """The gradient of an update over `tasks`, and its tally."""
    update = Update(policy, settings, uncond=uncond, old_is_current=old_is_current, check=nothing)
    tally = update.accumulate(tasks, len(tasks), micro_batch)
    return gradient(policy), tally
