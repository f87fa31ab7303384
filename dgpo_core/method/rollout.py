"""Draw groups: G samples per prompt with a deterministic solver, the initial noise being the only chance."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dgpo_core.common.errors import Diverged, UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.reading import shown
from dgpo_core.common.seeds import noise
from dgpo_core.diffusion.solvers import Solver
from dgpo_core.policy.base import Check, Cond, Policy


def nothing() -> None:
    """The check of a caller who never stops."""


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
    drawn: Callable[[Group], None] = lambda group: None,
) -> list[Group]:
    """One group per prompt, its samples drawn from its seeds, with the adapter that is active.

    size: (height, width) in pixels. batch: samples per forward, 0 for all at once; it bounds the memory, no more.
    drawn: is given each group as soon as all its samples are there.
    """
    policy.check_sources(prompts, size)
    conds, uncond = policy.condition(prompts, negative_prompt, size)
    counts = [len(row) for row in seeds]
    flat = [seed for row in seeds for seed in row]
    owner = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts))
    every = Cond.cat(conds)
    shape = policy.latent_shape(*size)
    latents: list[Tensor] = []
    images: list[Tensor] = []
    groups: list[Group] = []
    for part in torch.arange(len(flat)).split(batch or len(flat)):
        x_T = torch.stack([noise(flat[i], shape) for i in part.tolist()])
        without = uncond if len(uncond) == 1 else uncond.select(owner[part])
        x0 = policy.sample(solver, x_T, every.select(owner[part]), without, cfg, check)
        latents.append(x0)
        images.append(policy.decode(x0).cpu())
        while len(groups) < len(prompts) and counts[len(groups)] <= sum(map(len, images)):
            g = len(groups)
            groups.append(Group(prompts[g], tuple(seeds[g]), _take(latents, counts[g]), _take(images, counts[g])))
            _require_numbers(groups[-1])
            drawn(groups[-1])
    return groups


def _require_numbers(group: Group) -> None:
    """Raises UserError for pictures that hold no numbers, for which a reward would be blamed."""
    prompt = shown(repr(group.prompt.text), 60)
    if not group.latents.isfinite().all():
        raise Diverged(
            f"What was drawn for {prompt} is no picture (its latents are NaN or infinite): the weights have grown too"
            " large; lower training.lr or the LoRA's strength and go on from an earlier state, or take model.dtype"
            " float32 where the untrained model draws so."
        )
    if not group.images.sum().isfinite():
        raise UserError(
            f"What was drawn for {prompt} is no picture (the VAE gives NaN): take model.dtype bfloat16 or float32."
        )


def _take(parts: list[Tensor], n: int) -> Tensor:
    """The first n rows of tensors that stand for one; `parts` is left with the others."""
    taken = []
    while n:
        part = parts.pop(0)
        taken.append(part[:n])
        if len(part) > n:
            parts.insert(0, part[n:])
        n -= len(taken[-1])
    return torch.cat(taken)
