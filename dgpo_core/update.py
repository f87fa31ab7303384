"""One DGPO update: from scored groups to the gradient of the adapter.

Gradients accumulate over all groups and all training timesteps of an iteration; the caller then takes the one optimiser
step. The noise is shared by the samples of a group and drawn anew at each timestep.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dgpo_core import loss as L
from dgpo_core.config import TrainingConfig
from dgpo_core.group import Group
from dgpo_core.policy.base import AdapterName, Cond, Policy
from dgpo_core.prediction import Prediction
from dgpo_core.rollout import Check
from dgpo_core.seeds import noise


@dataclass(frozen=True)
class Task:
    """One group at one training timestep.

    A: advantages [G]; t: the model's timestep; noise_seed: of the noise that the whole group shares.
    """

    group: Group
    A: Tensor
    cond: Cond
    t: float
    noise_seed: int


@dataclass(frozen=True)
class Tally:
    """What an update saw, summed over samples, so that parts add up."""

    samples: int = 0
    clipped: int = 0
    loss: float = 0.0
    kl: float = 0.0
    error: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def means(self) -> dict[str, float]:
        """Means over samples: loss (surrogate and KL term), KL distance, denoising error, share of clipped samples."""
        n = max(self.samples, 1)
        return {"loss": self.loss / n, "kl": self.kl / n, "error": self.error / n, "clip_fraction": self.clipped / n}


def candidate_timesteps(levels: Tensor, prediction: Prediction, t_min: float) -> Tensor:
    """The roll-out's timesteps that may be trained: [n] descending in, the noisier part of it out.

    t_min < 1 is a noise level, nothing below it is kept; t_min >= 1 keeps the first so many; 0 keeps all. Few-step ODE
    images carry blur and artefacts at low noise: training there would teach them.
    """
    if t_min >= 1:
        return levels[: int(t_min)]
    return levels[prediction.level(levels) >= t_min]


def draw_timesteps(candidates: Tensor, settings: TrainingConfig, prediction: Prediction, seed: int) -> list[float]:
    """M training timesteps: from the candidates without replacement, or uniform over the span they leave."""
    generator = torch.Generator().manual_seed(seed)
    if settings.timestep_source == "rollout":
        return candidates[torch.randperm(len(candidates), generator=generator)[: settings.timesteps]].tolist()
    top = float(prediction.num_train_timesteps)
    low = settings.t_min * top if settings.t_min < 1 else float(candidates[-1])
    return (low + (top - low) * torch.rand(settings.timesteps, generator=generator)).tolist()


def whole_groups(tasks: Sequence[Task], micro_batch: int) -> Iterator[list[Task]]:
    """The tasks in order, as many at once as are of one group size and fit into a micro-batch; at least one."""
    for size, run in itertools.groupby(tasks, key=lambda task: len(task.group)):
        same, at_once = list(run), max(1, micro_batch // size)
        yield from (same[i : i + at_once] for i in range(0, len(same), at_once))


@dataclass(frozen=True)
class Rows:
    """K tasks stacked: K groups of G samples as B = K G rows, each group at its own timestep with its own noise."""

    x_t: Tensor
    target: Tensor
    t: Tensor
    cond: Cond
    A: Tensor
    group_size: int

    @staticmethod
    def of(tasks: Sequence[Task], policy: Policy) -> "Rows":
        """The noisy latents and targets of the tasks, whose groups are all of one size."""
        G = len(tasks[0].group)
        x0 = torch.cat([task.group.latents for task in tasks])
        eps = torch.stack([noise(task.noise_seed, tuple(x0.shape[1:])) for task in tasks])
        eps = eps.to(x0.device).repeat_interleave(G, dim=0)
        t = torch.tensor([task.t for task in tasks], device=x0.device).repeat_interleave(G)
        return Rows(
            x_t=policy.prediction.add_noise(x0, eps, t),
            target=policy.prediction.target(x0, eps, t),
            t=t,
            cond=Cond.cat([task.cond.expand(G) for task in tasks]),
            A=torch.cat([task.A for task in tasks]).to(x0.device),
            group_size=G,
        )

    def __len__(self) -> int:
        return len(self.A)

    def split(self, size: int) -> list["Rows"]:
        """Parts of at most `size` rows."""
        if len(self) <= size:
            return [self]
        cuts = [slice(i, i + size) for i in range(0, len(self), size)]
        return [
            replace(self, x_t=self.x_t[c], target=self.target[c], t=self.t[c], cond=self.cond.select(c), A=self.A[c])
            for c in cuts
        ]


@dataclass(frozen=True)
class Fixed:
    """What an update compares with, [B, ...] each: the reference's prediction for the KL term, and the errors of the
    reference and of the old policy; None where they equal the current policy's."""

    f_ref: Tensor | None
    d_ref: Tensor | None
    d_old: Tensor | None


class Update:
    """Accumulates the gradient of one iteration.

    old_is_current: the old policy equals the current one, so no forward of it is needed.
    uncond: the conditioning of the reference's unguided branch, where `kl_cfg` > 1.
    """

    def __init__(
        self, policy: Policy, settings: TrainingConfig, *, uncond: Cond | None, old_is_current: bool, check: Check
    ) -> None:
        self.policy, self.settings, self.uncond, self.check = policy, settings, uncond, check
        self.old_is_current = old_is_current

    def accumulate(self, tasks: Sequence[Task], total: int, micro_batch: int) -> Tally:
        """Adds the gradient of `tasks` to the adapter's, each task, of however many samples, weighing 1 / total.

        As many whole groups as fit into a micro-batch go through together; a group that does not fit is cut.
        """
        tally = Tally()
        for part in whole_groups(tasks, micro_batch):
            tally += self._backward_groups(Rows.of(part, self.policy), micro_batch, len(part) / total)
        return tally

    def _backward_groups(self, rows: Rows, micro_batch: int, share: float) -> Tally:
        """Whole groups: in one pass, or, cut into parts, with their logit found beforehand without gradients."""
        parts = rows.split(micro_batch)
        fixed = [self._fixed(part) for part in parts]
        weights: list[Tensor | None] = [None]
        if len(parts) > 1:
            d = torch.cat([self._current_error(part) for part in parts])
            d_ref = d if fixed[0].d_ref is None else torch.cat([part.d_ref for part in fixed])
            weights = list(self._weights(rows.A, d, d_ref, rows.group_size).split(micro_batch))
        tally = Tally()
        for part, known, weight in zip(parts, fixed, weights, strict=True):
            tally += self._backward(part, known, weight, share * len(part) / len(rows))
        return tally

    def _weights(self, A: Tensor, d: Tensor, d_ref: Tensor, G: int) -> Tensor:
        """Each sample's gradient weight, [K G], for rows of whole groups."""
        A, d, d_ref = A.view(-1, G), d.view(-1, G), d_ref.view(-1, G)
        s = L.group_logit(A, d, d_ref, self.settings.beta)
        return L.gradient_weight(s, A, self.settings.beta, self.settings.logit_scaling).flatten()

    @torch.no_grad()
    def _current_error(self, rows: Rows) -> Tensor:
        self.check()
        with self.policy.using("current"):
            return L.denoising_error(self.policy.predict(rows.x_t, rows.t, rows.cond), rows.target)

    @torch.no_grad()
    def _fixed(self, rows: Rows) -> Fixed:
        """The forwards without gradients: the reference, and the old policy where it differs from the current one."""
        moving = self.settings.reference == "old"
        d_old = f_ref = d_ref = None
        if (self.settings.clip > 0 or moving) and not self.old_is_current:
            f_old = self._predict("old", rows)
            d_old = L.denoising_error(f_old, rows.target)
            if moving:
                f_ref, d_ref = f_old, d_old
        if not moving:
            f_ref = self._predict(None, rows)
            d_ref = L.denoising_error(f_ref, rows.target)
        if self.settings.kl_weight > 0 and self.uncond is not None:
            adapter = "old" if moving else None
            c = self._predict(adapter, rows) if f_ref is None else f_ref
            u = self._predict(adapter, replace(rows, cond=self.uncond.expand(len(rows))))
            f_ref = u + self.settings.kl_cfg * (c - u)
        return Fixed(f_ref, d_ref, d_old)

    def _predict(self, adapter: AdapterName | None, rows: Rows) -> Tensor:
        self.check()
        with self.policy.using(adapter):
            return self.policy.predict(rows.x_t, rows.t, rows.cond)

    def _backward(self, rows: Rows, fixed: Fixed, weight: Tensor | None, share: float) -> Tally:
        """Forward and backward of the current policy. The loss is the surrogate plus the KL term, times `share`."""
        self.check()
        with self.policy.using("current"):
            f = self.policy.predict(rows.x_t, rows.t, rows.cond)
            d = L.denoising_error(f, rows.target)
            still = d.detach()
            if weight is None:
                d_ref = still if fixed.d_ref is None else fixed.d_ref
                weight = self._weights(rows.A, still, d_ref, rows.group_size)
            keep = torch.ones_like(still, dtype=torch.bool)
            if self.settings.clip > 0 and fixed.d_old is not None:
                keep = L.unclipped(rows.A, still, fixed.d_old, self.settings.clip)
            loss = L.surrogate(weight * keep, d)
            kl = torch.zeros_like(loss)
            if fixed.f_ref is not None:
                kl = L.denoising_error(f, fixed.f_ref).mean()
            if self.settings.kl_weight > 0:
                loss = loss + self.settings.kl_weight * kl
            (loss * share).backward()
        return Tally(
            samples=len(rows),
            clipped=int((~keep).sum()),
            loss=loss.item() * len(rows),
            kl=kl.item() * len(rows),
            error=float(still.sum()),
        )
