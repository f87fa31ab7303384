"""One DGPO update: from scored groups to the gradient of the adapter.

Gradients accumulate over all groups and all training timesteps of an iteration; the caller then takes the one optimiser
step. The noise is shared by the samples of a group and drawn anew at each timestep.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgpo_core.common.group import Group
from dgpo_core.common.seeds import derive_seed, noise
from dgpo_core.common.sending import sent
from dgpo_core.diffusion.prediction import Prediction
from dgpo_core.method import loss as L
from dgpo_core.method.half import loss_scale, smaller
from dgpo_core.method.rollout import Check
from dgpo_core.policy.base import AdapterName, Cond, Policy
from dgpo_core.settings.config import TrainingConfig


@dataclass(frozen=True)
class Task:
    """One group at one training timestep.

    A: advantages [G]; of a group whose rewards are all equal, exact zeros. uncond: the negative prompt's conditioning
    where it is this group's own, as in editors. t: the model's timestep; noise_seed: of the noise that the whole group
    shares, and of the LoRA dropout's masks.
    """

    group: Group
    A: Tensor
    cond: Cond
    t: float
    noise_seed: int
    uncond: Cond | None = None

    @property
    def prefers(self) -> bool:
        """Whether the group says which samples are better; else only the KL term has a gradient."""
        return bool(self.A.any())


@dataclass(frozen=True)
class Reference:
    """A prediction that the current policy is compared with: whose, and with how much guidance (1: none)."""

    adapter: AdapterName | None
    cfg: float

    @property
    def forwards(self) -> int:
        """A guided one has two branches."""
        return 1 if self.cfg == 1.0 else 2


@dataclass(frozen=True)
class References:
    """The two references of the objective. What a mode means is decided here and nowhere else.

    logit: gives d_ref of the group logit s_g. kl: f_base of the KL term and of the norm's guard, always the frozen
    base; None without both.
    """

    logit: Reference
    kl: Reference | None

    @staticmethod
    def of(settings: TrainingConfig) -> "References":
        """A frozen reference is the base with the guidance `kl_cfg`, in the logit and in the KL term alike (modes 1 and
        2a); a moving one is the old policy without guidance, in the logit alone (mode 2b)."""
        base = Reference(None, settings.kl_cfg)
        logit = base if settings.reference == "frozen" else OLD
        held = settings.kl_weight > 0 or settings.kl_target > 0 or settings.norm_guard > 0
        return References(logit, base if held else None)

    def asked(self, clip: float) -> list[Reference]:
        """All that a group which prefers something is compared with, each once: the old policy where it is clipped."""
        wanted = [self.logit, self.kl, OLD if clip > 0 else None]
        return list(dict.fromkeys(reference for reference in wanted if reference))


OLD = Reference("old", 1.0)
"""The old policy: of the clip, and of the logit where the reference moves."""


@dataclass(frozen=True)
class Tally:
    """What an update saw, summed over samples, so that parts add up.

    compared: samples that were held against the old policy; anchored: those whose distance to the base is known.
    """

    samples: int = 0
    compared: int = 0
    clipped: int = 0
    loss: float = 0.0
    anchored: int = 0
    kl: float = 0.0
    error: float = 0.0
    norm: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def means(self) -> dict[str, float]:
        """Means over samples: loss (all its terms), denoising error, share of clipped samples, and, where the base was
        asked, the KL term's distance to it and the norm of the prediction relative to its."""
        n = max(self.samples, 1)
        means = {"loss": self.loss / n, "error": self.error / n, "clip_fraction": self.clipped / max(self.compared, 1)}
        if not self.anchored:
            return means
        return {**means, "kl": self.kl / self.anchored, "norm_ratio": self.norm / self.anchored}


@dataclass(frozen=True)
class Seen:
    """What one micro-batch saw; `numbers` [5] are where it was computed, and nobody waits for them before the end.

    numbers: clipped samples, the mean loss, the mean distance to the base, the sums of the errors and of the norms.
    """

    samples: int
    compared: int
    anchored: int
    numbers: Tensor

    @staticmethod
    def tally(parts: Sequence["Seen"]) -> Tally:
        """All of them together: the one wait of an update for its device."""
        if not parts:
            return Tally()
        tally = Tally()
        for part, row in zip(parts, torch.stack([part.numbers for part in parts]).tolist(), strict=True):
            clipped, loss, kl, error, norm = row
            n = part.samples
            tally += Tally(n, part.compared, int(clipped), loss * n, part.anchored, kl * n, error, norm)
        return tally


def candidate_timesteps(levels: Tensor, prediction: Prediction, t_min: float) -> Tensor:
    """The roll-out's timesteps that may be trained: [n] descending in, the noisier part of it out.

    t_min < 1 is a noise level, nothing below it is kept; t_min >= 1 keeps the first so many; 0 keeps all. Few-step ODE
    images carry blur and artefacts at low noise: training there would teach them.
    """
    if t_min >= 1:
        return levels[: int(t_min)]
    return levels[prediction.level(levels) >= t_min]


def draw_timesteps(candidates: Tensor, settings: TrainingConfig, prediction: Prediction, seed: int) -> list[float]:
    """M training timesteps: from the candidates without replacement, or uniform over the span they leave (of models
    with a table of noise levels, over the table's entries)."""
    generator = torch.Generator().manual_seed(seed)
    if settings.timestep_source == "rollout":
        drawn = candidates[torch.randperm(len(candidates), generator=generator)[: settings.timesteps]]
        return prediction.nearest(drawn).tolist()  # some solvers step between the entries of a table
    top = float(prediction.num_train_timesteps)
    low = settings.t_min * top if settings.t_min < 1 else float(candidates[-1])
    t = low + (top - low) * torch.rand(settings.timesteps, generator=generator)
    return prediction.nearest(t).tolist()


def whole_groups(tasks: Sequence[Task], micro_batch: int) -> Iterator[list[Task]]:
    """The tasks, as many at once as are of one kind and group size and fit into a micro-batch; at least one.

    Those that prefer something come first, else they keep their order.
    """

    def kind(task: Task) -> tuple[bool, int]:
        return not task.prefers, len(task.group)

    tasks = sorted(tasks, key=lambda task: not task.prefers)
    for (_, size), run in itertools.groupby(tasks, key=kind):
        same, at_once = list(run), max(1, micro_batch // size)
        yield from (same[i : i + at_once] for i in range(0, len(same), at_once))


@dataclass(frozen=True)
class Rows:
    """K tasks stacked: K groups of G samples as B = K G rows, each group at its own timestep with its own noise.

    seeds: B seeds, each of one row's dropout masks; they depend on nothing that cuts or groups rows. uncond: where each
    group has its own, else None.
    """

    x_t: Tensor
    target: Tensor
    t: Tensor
    cond: Cond
    A: Tensor
    seeds: tuple[int, ...]
    group_size: int
    uncond: Cond | None = None

    @staticmethod
    def of(tasks: Sequence[Task], policy: Policy) -> "Rows":
        """The noisy latents and targets of the tasks, whose groups are all of one size."""
        G = len(tasks[0].group)
        x0 = torch.cat([task.group.latents for task in tasks])
        eps = torch.stack([noise(task.noise_seed, tuple(x0.shape[1:])) for task in tasks])
        eps = sent(eps, x0.device).repeat_interleave(G, dim=0)
        t = sent(torch.tensor([task.t for task in tasks]), x0.device).repeat_interleave(G)
        own = [task.uncond for task in tasks if task.uncond is not None]
        return Rows(
            x_t=policy.prediction.add_noise(x0, eps, t),
            target=policy.prediction.target(x0, eps, t),
            t=t,
            cond=Cond.cat([task.cond.expand(G) for task in tasks]),
            A=sent(torch.cat([task.A for task in tasks]), x0.device),
            seeds=tuple(derive_seed(task.noise_seed, "dropout", i) for task in tasks for i in range(G)),
            group_size=G,
            uncond=Cond.cat([uncond.expand(G) for uncond in own]) if own else None,
        )

    def __len__(self) -> int:
        return len(self.A)

    def split(self, size: int) -> list["Rows"]:
        """Parts of at most `size` rows."""
        if len(self) <= size:
            return [self]
        cuts = [slice(i, i + size) for i in range(0, len(self), size)]
        return [self._rows(cut) for cut in cuts]

    def _rows(self, c: slice) -> "Rows":
        uncond = None if self.uncond is None else self.uncond.select(c)
        noisy = self.x_t[c], self.target[c], self.t[c]
        return Rows(*noisy, self.cond.select(c), self.A[c], self.seeds[c], self.group_size, uncond)


@dataclass(frozen=True)
class Fixed:
    """What an update compares with, [B, ...] each: the base's prediction for the KL term, and the errors of the logit's
    reference and of the old policy; None where they are not needed or equal the current policy's."""

    f_base: Tensor | None = None
    d_ref: Tensor | None = None
    d_old: Tensor | None = None


class Update:
    """Accumulates the gradient of one iteration.

    old_is_current: the old policy equals the current one, so no forward of it is needed.
    uncond: the conditioning of a guided reference's other branch, where `kl_cfg` is not 1 and rows have none of their
    own.
    """

    def __init__(
        self, policy: Policy, settings: TrainingConfig, *, uncond: Cond | None, old_is_current: bool, check: Check
    ) -> None:
        self.policy, self.settings, self.uncond, self.check = policy, settings, uncond, check
        self.references = References.of(settings)
        self.old_is_current = old_is_current
        self.scale = 1.0

    def accumulate(self, tasks: Sequence[Task], total: int, micro_batch: int) -> Tally:
        """Gives the adapter, which has none yet, the gradient of `tasks`, each of which weighs 1 / total.

        As many whole groups as fit into a micro-batch go through together; a group that does not fit is cut. In float16
        it is computed at a larger scale, once more at a smaller one where that was too large.
        """
        self.scale = self._first_scale(tasks, total)
        while True:
            tally = self._accumulate(tasks, total, micro_batch)
            if self.scale == 1.0:
                return tally
            gradients = [p.grad for p in self.policy.trainable().values() if p.grad is not None]
            finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()  # one wait for the device
            if finite or not math.isfinite(tally.loss):
                for gradient in gradients:
                    gradient.div_(self.scale)
                return tally
            for gradient in gradients:
                gradient.zero_()
            self.scale = smaller(self.scale)

    def _first_scale(self, tasks: Sequence[Task], total: int) -> float:
        if not tasks:
            return 1.0
        latents, t = tasks[0].group.latents, self.settings
        return loss_scale(self.policy.dtype, latents.numel() * total / (t.beta if t.logit_scaling == "paper" else 1.0))

    def _accumulate(self, tasks: Sequence[Task], total: int, micro_batch: int) -> Tally:
        """Adds the gradient, `scale` times as large, to the adapter's."""
        seen: list[Seen] = []
        for part in whole_groups(tasks, micro_batch):
            rows, share = Rows.of(part, self.policy), len(part) / total
            if part[0].prefers:
                seen += self._compare(rows, micro_batch, share)
            elif self.references.kl:
                seen += self._anchor(rows, self.references.kl, micro_batch, share)
        return Seen.tally(seen)

    def _compare(self, rows: Rows, micro_batch: int, share: float) -> list[Seen]:
        """Whole groups: in one pass, or, cut into parts, with their logit found beforehand without gradients."""
        parts = rows.split(micro_batch)
        fixed = [self._fixed(part) for part in parts]
        weights: list[Tensor | None] = [None]
        if len(parts) > 1:
            d = torch.cat([self._current_error(part) for part in parts])
            known = [part.d_ref for part in fixed if part.d_ref is not None]
            d_ref = torch.cat(known) if known else d
            weights = list(self._weights(rows.A, d, d_ref, rows.group_size).split(micro_batch))
        each = zip(parts, fixed, weights, strict=True)
        return [self._backward(part, known, weight, share * len(part) / len(rows)) for part, known, weight in each]

    def _anchor(self, rows: Rows, reference: Reference, micro_batch: int, share: float) -> list[Seen]:
        """Whole groups that prefer nothing: the KL term's gradient alone."""
        seen = []
        for part in rows.split(micro_batch):
            with torch.no_grad():
                fixed = Fixed(f_base=self._predict(reference, part))
            seen.append(self._backward(part, fixed, torch.zeros_like(part.A), share * len(part) / len(rows)))
        return seen

    def _weights(self, A: Tensor, d: Tensor, d_ref: Tensor, G: int) -> Tensor:
        """Each sample's gradient weight, [K G], for rows of whole groups."""
        A, d, d_ref = A.view(-1, G), d.view(-1, G), d_ref.view(-1, G)
        s = L.group_logit(A, d, d_ref, self.settings.beta)
        return L.gradient_weight(s, A, self.settings.beta, self.settings.logit_scaling).flatten()

    @torch.no_grad()
    def _current_error(self, rows: Rows) -> Tensor:
        self.check()
        with self.policy.using("current"), self.policy.dropping(rows.seeds):
            return L.denoising_error(self.policy.predict(rows.x_t, rows.t, rows.cond), rows.target)

    @torch.no_grad()
    def _fixed(self, rows: Rows) -> Fixed:
        """The forwards without gradients, none of them twice: the references, and the old policy for the clip."""
        asked = self.references.asked(self.settings.clip)
        needed = [reference for reference in asked if not (reference == OLD and self.old_is_current)]
        f = {reference: self._predict(reference, rows) for reference in needed}
        d = {reference: L.denoising_error(answer, rows.target) for reference, answer in f.items()}
        # without a KL term the distance to the base is still told where the logit asks the base
        f_base = next((answer for reference, answer in f.items() if reference.adapter is None), None)
        return Fixed(f_base, d.get(self.references.logit), d.get(OLD))

    def _predict(self, reference: Reference, rows: Rows) -> Tensor:
        """The guided prediction, or c where a reference is not guided; u and c one after the other, for the memory."""
        self.check()
        with self.policy.using(reference.adapter):
            c = self.policy.predict(rows.x_t, rows.t, rows.cond)
            if reference.cfg == 1.0:
                return c
            uncond = rows.uncond
            if uncond is None and self.uncond is not None:
                uncond = self.uncond.expand(len(rows))
            if uncond is None:
                raise ValueError("a guided reference needs `uncond`")
            self.check()
            u = self.policy.predict(rows.x_t, rows.t, uncond)
        return self.policy.guide(u, c, reference.cfg)

    def _backward(self, rows: Rows, fixed: Fixed, weight: Tensor | None, share: float) -> Seen:
        """Forward and backward of the current policy. The loss is the surrogate, the KL term and the norm's guard,
        times `share`.

        What the clip stops keeps the gradient of the last two.
        """
        self.check()
        # enable_grad: a reward's code may have turned gradients off for the whole process
        with torch.enable_grad(), self.policy.using("current"), self.policy.dropping(rows.seeds):
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
            kl = torch.zeros_like(loss) if fixed.f_base is None else L.denoising_error(f, fixed.f_base).mean()
            ratio = torch.zeros_like(still) if fixed.f_base is None else L.norm_ratio(f, fixed.f_base)
            if self.references.kl:
                loss = loss + self.settings.kl_weight * kl
            if self.settings.norm_guard:
                loss = loss + self.settings.norm_guard * L.growth(ratio).mean()
            (loss * (share * self.scale)).backward()
        return Seen(
            samples=len(rows),
            compared=0 if fixed.d_old is None else len(rows),
            anchored=0 if fixed.f_base is None else len(rows),
            numbers=torch.stack([(~keep).sum(), loss.detach(), kl.detach(), still.sum(), ratio.detach().sum()]),
        )
