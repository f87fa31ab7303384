"""The objective, written out once more from the paper and its authors' settings, against the gradient of the update.

Nothing of `loss.py`, `advantage.py` or `update.py` computes the expected values here. The model is the embedded one,
with three adapters that differ: of the current policy, of the old one, and none (the base).
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine import accumulate, distance, moved
from torch import Tensor

from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.seeds import noise
from dgpo_core.method.update import Task
from dgpo_core.policy import Cond, Policy
from dgpo_core.runs import assemble
from dgpo_core.settings.config import Config, MemoryConfig, TrainingConfig

CLOSE = 1e-5  # relative; float32 sums in another order differ by 1e-6
G = 4
PROMPTS = ("two red circles", "a blue square above a green circle", "one green triangle")
LEVELS = (900.0, 640.0)
ADVANTAGES = ((1.5, -0.5, -0.25, -0.75), (-1.0, 0.2, 0.5, 0.3), (0.0, 0.0, 0.0, 0.0))  # the last: equal rewards


@pytest.fixture(scope="module")
def embedded() -> Policy:
    """The embedded model; its old adapter is near its current one, so that some samples are clipped and some not."""
    config = replace(Config(), memory=MemoryConfig(gradient_checkpointing=False))
    policy, _ = assemble.load_model(config, "cpu")
    moved(policy, "current", seed=1, size=0.05)
    moved(policy, "old", seed=1, size=0.048)
    return policy


@pytest.fixture(scope="module")
def tasks(embedded: Policy) -> list[Task]:
    """Three groups at two noise levels each."""
    shape = embedded.latent_shape(*embedded.default_size)
    found = []
    for g, (text, advantages) in enumerate(zip(PROMPTS, ADVANTAGES, strict=True)):
        latents = torch.stack([noise(10 * g + i, shape) for i in range(G)])
        group = Group(Prompt(text), tuple(range(G)), latents, torch.zeros(G, 3, 8, 8))
        (cond,) = embedded.encode([text])
        found += [Task(group, torch.tensor(advantages), cond, t, 100 + 10 * g + i) for i, t in enumerate(LEVELS)]
    return found


def objective(policy: Policy, tasks: Sequence[Task], t: TrainingConfig) -> Tensor:
    """The scalar whose gradient the update is to accumulate, the groups one by one."""
    (empty,) = policy.encode([""])
    total = torch.zeros(())
    for task in tasks:
        s = task.t / 1000
        x0, A = task.group.latents, task.A
        eps = noise(task.noise_seed, tuple(x0.shape[1:]))
        x_t, v = (1 - s) * x0 + s * eps, eps - x0

        def f(adapter: Any, cond: Cond, x_t: Tensor = x_t, t: float = task.t) -> Tensor:
            with policy.using(adapter):
                return policy.predict(x_t, torch.full((G,), t), cond.expand(G))

        def mse(a: Tensor, b: Tensor) -> Tensor:
            return ((a - b) ** 2).mean(dim=(1, 2, 3))

        with torch.no_grad():
            old = f("old", task.cond)
            base = f(None, task.cond)
            if t.kl_cfg > 1:
                u = f(None, empty)
                base = u + t.kl_cfg * (base - u)
        now = f("current", task.cond)
        d = mse(now, v)
        d_ref = mse(old if t.reference == "old" else base, v)
        logit = t.beta / G * sum(A[i] * (d[i] - d_ref[i]) for i in range(G))
        weight = torch.sigmoid(logit).detach()
        # -log sigmoid(-logit) has the gradient sigmoid(logit) * grad logit; the authors leave beta out of it
        weight = weight * (t.beta if t.logit_scaling == "paper" else 1.0)
        ratio = torch.exp(mse(old, v) - d).detach()
        for i in range(G):
            ahead = ratio[i] > 1 + t.clip if A[i] > 0 else ratio[i] < 1 - t.clip
            if not (t.clip > 0 and ahead):
                total = total + weight * A[i] * d[i] / G
        total = total + t.kl_weight * mse(now, base).mean()
    return total / len(tasks)


def expected(policy: Policy, tasks: Sequence[Task], t: TrainingConfig) -> Tensor:
    parameters = policy.trainable()
    found = torch.autograd.grad(objective(policy, tasks, t), [parameters[key] for key in sorted(parameters)])
    return torch.cat([g.flatten() for g in found])


def found(policy: Policy, tasks: Sequence[Task], t: TrainingConfig, micro_batch: int) -> Tensor:
    (empty,) = policy.encode([""])
    return accumulate(policy, tasks, t, micro_batch, uncond=empty if t.kl_cfg > 1 else None)[0]


MODES = [
    {"reference": reference, "kl_cfg": kl_cfg, "clip": clip, "logit_scaling": scaling, "kl_weight": kl_weight}
    for reference, kl_cfg, clip, scaling, kl_weight in itertools.product(
        ("frozen", "old"), (1.0, 4.5), (0.0, 2e-4), ("official", "paper"), (0.0, 0.1)
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: ",".join(map(str, mode.values())))
def test_every_mode_has_the_objectives_gradient(mode: dict[str, Any], embedded: Policy, tasks: list[Task]) -> None:
    t = replace(Config().training, beta=100.0, **mode)
    exact = expected(embedded, tasks, t)
    assert exact.norm() > 0
    for micro_batch in (64, 3):  # whole groups together, and groups that are cut
        assert distance(found(embedded, tasks, t, micro_batch), exact) < CLOSE


def test_the_logarithm_of_the_paper_has_this_gradient_too(embedded: Policy, tasks: list[Task]) -> None:
    """Without a clip, "paper" is the gradient of the mean of -log sigmoid(-s_g) itself."""
    t = replace(Config().training, beta=100.0, clip=0.0, kl_weight=0.0, logit_scaling="paper")
    parameters = embedded.trainable()
    losses = []
    for task in tasks:
        x0, s = task.group.latents, task.t / 1000
        eps = noise(task.noise_seed, tuple(x0.shape[1:]))
        args = (1 - s) * x0 + s * eps, torch.full((G,), task.t), task.cond.expand(G)
        errors = []
        for adapter in ("current", None):
            with embedded.using(adapter):
                errors.append(((embedded.predict(*args) - eps + x0) ** 2).mean(dim=(1, 2, 3)))
        logit = t.beta / G * (task.A * (errors[0] - errors[1].detach())).sum()
        losses.append(-torch.log(torch.sigmoid(-logit)))
    mean = torch.stack(losses).mean()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(mean, [parameters[k] for k in sorted(parameters)])])
    assert distance(found(embedded, tasks, t, 64), exact) < CLOSE


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"kl_cfg": 1.0}, {"kl_cfg": 4.5}),  # the guidance counts in the logit
        ({"kl_cfg": 1.0, "kl_weight": 0.1, "reference": "old"}, {"kl_cfg": 4.5, "kl_weight": 0.1, "reference": "old"}),
        ({"reference": "frozen"}, {"reference": "old"}),
        ({"clip": 0.0}, {"clip": 2e-4}),
        ({"kl_weight": 0.0}, {"kl_weight": 0.1}),
    ],
)
def test_the_cases_differ_far_more_than_the_tolerance(
    one: dict[str, Any], other: dict[str, Any], embedded: Policy, tasks: list[Task]
) -> None:
    base = {"beta": 100.0, "clip": 0.0, "kl_weight": 0.0}
    a, b = (found(embedded, tasks, replace(Config().training, **{**base, **mode}), 64) for mode in (one, other))
    assert distance(a, b) > 100 * CLOSE
