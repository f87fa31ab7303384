"""Draw groups: G samples per prompt with a deterministic solver, the initial noise being the only chance."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dgpo_core.group import Group
from dgpo_core.policy.base import Cond, Policy, guided
from dgpo_core.prompts import Prompt
from dgpo_core.seeds import noise
from dgpo_core.solvers import Solver

Check = Callable[[], None]  # called before every forward; raises to stop


def nothing() -> None:
    """The check of a caller who never stops."""


@torch.no_grad()
def draw(
    policy: Policy,
    solver: Solver,
    cond: Cond,
    uncond: Cond | None,
    cfg: float,
    x_T: Tensor,
    check: Check = nothing,
) -> Tensor:
    """Clean latents x0 [B, C, h, w] from initial noise x_T [B, C, h, w], for a cond of B rows."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        check()
        return guided(policy, x, t, cond, uncond, cfg)

    return solver.sample(predict, x_T.to(policy.device))


@torch.no_grad()
def rollout(
    policy: Policy,
    solver: Solver,
    prompts: Sequence[Prompt],
    seeds: Sequence[Sequence[int]],
    *,
    size: tuple[int, int],
    cfg: float = 1.0,
    negative_prompt: str = "",
    batch: int = 0,
    check: Check = nothing,
) -> list[Group]:
    """One group per prompt, its samples drawn from its seeds, with the adapter that is active.

    size: (height, width) in pixels. batch: samples per forward, 0 for all at once; it bounds the memory, no more.
    """
    conds = policy.encode([prompt.text for prompt in prompts])
    uncond = policy.encode([negative_prompt])[0] if cfg != 1.0 else None
    counts = [len(row) for row in seeds]
    flat = [seed for row in seeds for seed in row]
    owner = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts))
    every = Cond.cat(conds)
    shape = policy.latent_shape(*size)
    latents, images = [], []
    for part in torch.arange(len(flat)).split(batch or len(flat)):
        x_T = torch.stack([noise(flat[i], shape) for i in part.tolist()])
        x0 = draw(policy, solver, every.select(owner[part]), uncond, cfg, x_T, check)
        latents.append(x0)
        images.append(policy.decode(x0).cpu())
    rows = zip(prompts, seeds, torch.cat(latents).split(counts), torch.cat(images).split(counts), strict=True)
    return [Group(prompt, tuple(s), x0, image) for prompt, s, x0, image in rows]
