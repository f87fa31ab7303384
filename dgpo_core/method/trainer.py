"""DGPO, one iteration at a time: rollout, reward, advantage, update (arXiv 2510.08425).

The trainer holds the policy, the optimiser and the step; everything random derives from (seed, step), so a trainer that
is loaded from a checkpoint goes on exactly as the one that saved it.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dgpo_core.common.distributed import World
from dgpo_core.common.errors import UserError, out_of_memory
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt, PromptStream
from dgpo_core.common.reading import shown
from dgpo_core.common.seeds import derive_seed
from dgpo_core.method import advantage as adv
from dgpo_core.method.ema import ema_, fast_decay
from dgpo_core.method.gating import counted
from dgpo_core.method.offline import RatedGroups
from dgpo_core.method.rollout import Check, nothing, rollout
from dgpo_core.method.update import Tally, Task, Update, candidate_timesteps, draw_timesteps
from dgpo_core.policy.base import AdapterName, Cond, Policy
from dgpo_core.rewards import Reward, Scoring, guard, weights_of
from dgpo_core.settings.config import Config, RewardTerm
from dgpo_core.settings.gates import Gate


@dataclass(frozen=True)
class Iteration:
    """What one iteration did: its groups (this process's), its numbers for the log, seconds by phase, warnings."""

    groups: list[Group]
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    warnings: Sequence[str] = ()

    def without(self, skipped: Sequence[str]) -> "Iteration":
        """The same, with a count and a warning of groups that were left out, one problem for each."""
        told = f"{len(skipped)} group(s) left out: {skipped[0].removesuffix('.')}"
        return replace(self, metrics={**self.metrics, "skipped": len(skipped)}, warnings=[*self.warnings, told])


@dataclass
class Stopwatch:
    """Seconds by phase, the accelerator's queue included."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Trainer:
    """Trains `policy`'s adapter on `rewards` over `prompts`.

    `iterate` is the whole algorithm; a caller who has the steps in hands of its own (a graph of nodes, a person who
    scores) calls `draw` and `learn` instead, and may leave out prompts and rewards.
    rewards: by name, those of `config.reward`. check: called before every forward; what it raises ends the iteration
    with the weights as they were before it.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        rewards: Mapping[str, Reward],
        config: Config,
        *,
        size: tuple[int, int],
        world: World | None = None,
        check: Check = nothing,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.policy, self.rewards, self.config, self.size = policy, rewards, config, size
        self.world = world or World(str(policy.device))
        self.weights = weights_of(config.reward)
        self.check, self.tell = check, tell
        order_seed = config.seed if config.data.order_seed < 0 else config.data.order_seed
        self.stream = PromptStream(prompts, config.data.groups_per_iteration, order_seed)
        drawn = config.rollout
        self.solver = policy.solver(drawn.solver, drawn.steps, *size, scheduler=drawn.scheduler)
        self.candidates = self._candidates()
        self.parameters = policy.trainable()
        t = config.training
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=t.lr, betas=t.betas, weight_decay=t.weight_decay, foreach=True
        )
        self.step = 0
        self.empty_in_a_row = 0  # iterations without a group that could be scored
        self.old_is_current = True
        self.micro_batch = t.micro_batch
        self.rollout_batch = config.rollout.batch

    # --- the algorithm -----------------------------------------------------------------------------------------------

    def iterate(self) -> Iteration:
        """One iteration: draw groups, score them, compare them, take one optimiser step."""
        watch = Stopwatch(self.policy.device)
        mine = self.world.share(list(enumerate(self.stream.at(self.step))))
        with watch.phase("encode"):
            self._encode([prompt.text for _, prompt in mine])
        with self._scoring() as scoring:
            with watch.phase("rollout"):
                groups = self.draw(mine, scoring.start)
            with watch.phase("reward"):
                scored, skipped = self._usable(mine, scoring.results(groups))
        if skipped and not self.world.any(bool(scored)):
            return self._without_any(skipped, watch)
        self.empty_in_a_row = 0
        done = self.learn([group for _, group in scored], [place for place, _ in scored], watch)
        return done.without(skipped) if skipped else done

    def _without_any(self, skipped: Sequence[str], watch: Stopwatch) -> Iteration:
        """An iteration whose groups all failed takes no step; raises UserError after `EMPTY_IN_A_ROW` of them."""
        self.empty_in_a_row += 1
        if self.empty_in_a_row >= EMPTY_IN_A_ROW:
            raise UserError(f"No group of {EMPTY_IN_A_ROW} iterations in a row could be scored. {skipped[0]}")
        self._advance()
        return Iteration([], {"informative": 0.0}, watch.seconds, [NOTHING_SCORED]).without(skipped)

    def iterate_rated(self, rated: RatedGroups) -> Iteration:
        """One iteration without a roll-out: take groups that people rated, compare them, take one optimiser step."""
        watch = Stopwatch(self.policy.device)
        mine = self.world.share(list(enumerate(rated.at(self.step))))
        groups = []
        with watch.phase("images"):
            for _, group in mine:
                self.check()
                groups.append(rated.load(group, self.policy, self.size))
        return self.learn(groups, [place for place, _ in mine], watch)

    def draw(
        self, mine: Sequence[tuple[int, Prompt]], drawn: Callable[[Group], None] = lambda group: None
    ) -> list[Group]:
        """One group for each (place in the iteration, prompt), not yet scored; `drawn` is given each at once.

        Each sample has a seed of its own, which depends on nothing but the run's seed, the step and its place.
        """
        if not mine:  # more processes than groups
            return []
        settings, k = self.config.rollout, self.step
        rows = range(settings.group_size)
        seeds = [[derive_seed(self.config.seed, "rollout", k, g, i) for i in rows] for g, _ in mine]
        adapter: AdapterName = "current" if k <= settings.on_policy_steps or self.old_is_current else "old"
        done: list[Group] = []

        def hand_on(group: Group) -> None:
            done.append(group)
            drawn(group)

        def work(batch: int) -> None:
            rest = slice(len(done), None)  # after a try without enough memory: nothing is drawn, or scored, twice
            with self.policy.using(adapter):
                rollout(
                    self.policy,
                    self.solver,
                    [prompt for _, prompt in mine[rest]],
                    seeds[rest],
                    size=self.size,
                    cfg=settings.cfg,
                    negative_prompt=settings.negative_prompt,
                    batch=batch,
                    check=self.check,
                    drawn=hand_on,
                )

        _, self.rollout_batch = self.within_memory(work, self.rollout_batch, len(mine) * settings.group_size)
        return done

    def learn(self, groups: Sequence[Group], places: Sequence[int], watch: Stopwatch | None = None) -> Iteration:
        """Compare the scored groups (of any sizes) and take one optimiser step; `places` are theirs in `draw`."""
        watch = watch or Stopwatch(self.policy.device)
        with watch.phase("encode"):
            conds = self._encode([group.prompt.text for group in groups])
        with watch.phase("update"):
            r, A = self._advantages(groups)
            # equal rewards have equal advantages, and only they have
            told = [bool(adv.informative(row[None])) for row in A]
            tasks = self._tasks(places, groups, A, conds, told)
            everywhere = sum(self.world.gather([len(groups)]))
            tally, norm = self._update(tasks, total=everywhere * self.config.training.timesteps)
        self._advance()
        metrics = self._metrics(groups, r, told, tally, norm)
        warnings = [NOTHING_TO_LEARN] if metrics["informative"] == 0 else []
        return Iteration(list(groups), metrics, watch.seconds, warnings)

    def _scoring(self) -> Scoring:
        skip = self.config.on_bad_score == "skip"
        return Scoring(self.rewards, self.policy.device, self.config.rollout.group_size, one_by_one=skip)

    def _usable(
        self, mine: Sequence[tuple[int, Prompt]], outcomes: Sequence[Group | UserError]
    ) -> tuple[list[tuple[int, Group]], list[str]]:
        """The scored groups with their places; and of all processes, why other groups are left out.

        With offloading, reward models leave the accelerator.
        """
        if self.config.memory.offload:
            guard.idle(self.rewards)
        scored = [(g, group) for (g, _), group in zip(mine, outcomes, strict=True) if isinstance(group, Group)]
        if self.config.on_bad_score == "stop":
            return scored, []
        return scored, self.world.gather([str(error) for error in outcomes if isinstance(error, UserError)])

    def _advantages(self, groups: Sequence[Group]) -> tuple[list[Tensor], list[Tensor]]:
        """Combined rewards r and advantages A of this process's groups, [G] each; G may differ from group to group."""
        t = self.config.training
        weights, terms = self.weights, self.config.reward
        own = [{term.name: counted(g.scores, term, weights[term.name]) for term in terms} for g in groups]
        everyone = {name: torch.cat(self.world.gather([row[name] for row in own])) for name in weights}

        def total(values: Mapping[str, Tensor]) -> Tensor:
            return adv.weighted_sum([(weights[name], values[name]) for name in values])

        def advantage(r: Tensor, of_all: Tensor) -> Tensor:
            rows = r[None]
            return (adv.group_advantage(rows) if t.advantage_std == "group" else adv.global_advantage(rows, of_all))[0]

        r = [total(row) for row in own]
        if self.config.combine == "sum":
            of_all = total(everyone)
            A = [advantage(row, of_all) for row in r]
        else:
            A = [total({name: advantage(row[name], everyone[name]) for name in row}) for row in own]
        return r, [adv.clamp(row, t.advantage_clamp) for row in A]

    def _tasks(
        self,
        places: Sequence[int],
        groups: Sequence[Group],
        A: Sequence[Tensor],
        conds: Sequence[Cond],
        told: Sequence[bool],
    ) -> list[Task]:
        """Every group at each of the iteration's M timesteps. One of equal rewards has the KL term's gradient alone:
        without that term it is left out."""
        t, seed, k = self.config.training, self.config.seed, self.step
        levels = draw_timesteps(self.candidates, t, self.policy.prediction, derive_seed(seed, "timesteps", k))
        tasks = []
        for i, g in enumerate(places):
            if not told[i] and not t.kl_weight:
                continue
            A_g = A[i] if told[i] else torch.zeros_like(A[i])  # equal rewards: exactly nothing, whatever was rounded
            for m, level in enumerate(levels):
                tasks.append(Task(groups[i], A_g, conds[i], level, derive_seed(seed, "noise", k, g, m)))
        return tasks

    def _update(self, tasks: Sequence[Task], total: int) -> tuple[Tally, float]:
        """Accumulate the gradient over all tasks and processes, then one clipped optimiser step."""
        t = self.config.training
        uncond = self.policy.encode([self.config.rollout.negative_prompt])[0] if t.kl_cfg != 1.0 else None
        # an old policy of the same weights still predicts otherwise where the current one has dropout: it has none
        same = self.old_is_current and not self.config.lora.dropout
        update = Update(self.policy, t, uncond=uncond, old_is_current=same, check=self.check)

        def accumulate(micro_batch: int) -> Tally:
            self.optimizer.zero_grad(set_to_none=False)
            # for plug-ins that draw from torch's own generator: it is a function of seed and step, too
            torch.manual_seed(derive_seed(self.config.seed, "torch", self.step, self.world.rank))
            return update.accumulate(tasks, total, micro_batch)

        samples = sum(len(task.group) for task in tasks)
        tally, self.micro_batch = self.within_memory(accumulate, self.micro_batch, samples)
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        if not self.world.any(bool(tasks)):
            return tally, 0.0
        self.world.add_(gradients)
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), t.max_grad_norm or math.inf))
        if not math.isfinite(norm + tally.loss):
            raise UserError(
                f"The loss or its gradient is not a finite number in iteration {self.step + 1}: lower training.lr,"
                " training.beta or training.kl_weight; the state before this iteration is kept."
            )
        self.check()
        self.optimizer.step()
        return tally, norm

    def _advance(self) -> None:
        """Count the step and let the two moving averages follow."""
        t = self.config.training
        current = self.policy.adapter_state("current")
        decay = fast_decay(self.step, t.ema_fast_max, t.ema_fast_rate)
        self.step += 1
        ema_(self.policy.adapter_state("old"), current, decay)
        self.old_is_current = decay == 0.0
        if self.step < t.ema_slow_every:  # so that a short run does not save what it began with
            ema_(self.policy.adapter_state("ema"), current, 0.0)
        elif self.step % t.ema_slow_every == 0:
            ema_(self.policy.adapter_state("ema"), current, t.ema_slow)

    # --- around it ---------------------------------------------------------------------------------------------------

    def _candidates(self) -> Tensor:
        t = self.config.training
        kept = candidate_timesteps(self.solver.timesteps, self.policy.prediction, t.t_min)
        enough = len(kept) >= (t.timesteps if t.timestep_source == "rollout" else 1)
        if not enough:
            raise UserError(
                f"training.timesteps asks for {t.timesteps} different timesteps, but training.t_min {t.t_min:g} leaves"
                f" {len(kept)} of the {len(self.solver.timesteps)} of the roll-out: lower one of them."
            )
        return kept

    def _encode(self, texts: Sequence[str]) -> list[Cond]:
        """Conditionings of the prompts; the one of the negative prompt is made with them."""
        return self.policy.encode([*texts, self.config.rollout.negative_prompt])[: len(texts)]

    def within_memory(self, work: Callable[[int], Any], batch: int, whole: int) -> tuple[Any, int]:
        """work(batch), again with half the batch when the accelerator runs out of memory; and the batch that did it."""
        while True:
            try:
                return work(batch), batch
            except torch.OutOfMemoryError:
                size = min(batch or whole, whole)
                if size == 1:
                    raise UserError(
                        "The accelerator's memory is too small for one sample: turn on memory.gradient_checkpointing"
                        " and memory.offload, or choose a smaller image size."
                    ) from None
                batch = size // 2
            torch.cuda.empty_cache()
            self.tell(f"Out of memory with {size} samples at once: going on with {batch}.")

    def _metrics(
        self, groups: Sequence[Group], r: Sequence[Tensor], told: Sequence[bool], tally: Tally, norm: float
    ) -> dict[str, float]:
        """The numbers of the iteration over all processes."""
        every = self.world.gather([(group.scores, r[i], told[i]) for i, group in enumerate(groups)])
        tallies = self.world.gather([tally])
        rewards = [row for _, row, _ in every]
        metrics = {
            "reward": torch.cat(rewards).mean().item(),
            "reward_std": torch.stack([row.std(correction=0) for row in rewards]).mean().item(),
            "informative": sum(flag for _, _, flag in every) / len(every),
        }
        raw = [scores for scores, _, _ in every]
        for term in self.config.reward:
            metrics |= reward_metrics(raw, term)
        return {**metrics, **sum(tallies, Tally()).means(), "grad_norm": norm}

    # --- state -------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a run needs to go on, as flat tensors and JSON."""
        tensors = {f"{n}/{k}": v for n in ADAPTERS for k, v in self.policy.adapter_state(n).items()}
        for key, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors.update({f"optimizer/{name}/{key}": value for name, value in moments.items()})
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.policy.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.policy.device)
        return tensors, {"step": self.step, "old_is_current": self.old_is_current}

    def load_state(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """The inverse of `state`. Raises UserError for tensors of another model or LoRA, and for no trainer's state."""
        try:
            self._load_state(tensors, info)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            told = f"The checkpoint does not hold the state of a training ({type(error).__name__}: {shown(error)})."
            raise out_of_memory(error) or UserError(told) from error

    def _load_state(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        step, old_is_current = int(info["step"]), bool(info["old_is_current"])
        with torch.no_grad():
            for name in ADAPTERS:
                for key, value in self.policy.adapter_state(name).items():
                    saved = tensors.get(f"{name}/{key}")
                    if saved is None or saved.shape != value.shape:
                        raise UserError(f"The checkpoint does not fit this model and LoRA: {name}/{key} differs.")
                    value.copy_(saved)
        for key, parameter in self.parameters.items():
            names = ("step", "exp_avg", "exp_avg_sq")
            saved = {name: tensors.get(f"optimizer/{name}/{key}") for name in names}
            if saved["step"] is not None:
                self.optimizer.state[parameter] = {
                    name: value.clone() if name == "step" else value.to(parameter.device, copy=True)
                    for name, value in saved.items()
                }
        torch.set_rng_state(tensors["rng/cpu"])
        if "rng/cuda" in tensors and self.policy.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng/cuda"], self.policy.device)
        self.step, self.old_is_current = step, old_is_current


def reward_metrics(scores: Sequence[Mapping[str, Tensor]], term: RewardTerm) -> dict[str, float]:
    """Of one reward over groups' raw scores: mean, mean deviation within a group, share of samples it is gated for."""
    rows = [group[term.name] for group in scores]
    found = {
        f"reward/{term.name}": torch.cat(rows).mean().item(),
        f"reward_std/{term.name}": torch.stack([row.std(correction=0) for row in rows]).mean().item(),
    }
    if term.only_if:
        gate = Gate.of(term.only_if, term.name)
        passed = gate.passed(torch.cat([group[gate.reward] for group in scores]))
        found[f"gated/{term.name}"] = 1 - passed.float().mean().item()
    return found


EMPTY_IN_A_ROW = 10
"""Iterations without a group that can be scored after which `on_bad_score` "skip" gives up: it is no chance then."""

ADAPTERS = ("current", "old", "ema")
NOTHING_SCORED = "no group could be scored, so the weights stay as they are"
NOTHING_TO_LEARN = (
    "all rewards were equal within every group, so there was nothing to learn: use a graded reward, larger groups or"
    " harder prompts"
)
