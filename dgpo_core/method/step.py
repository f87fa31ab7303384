"""One step of DGPO from its two sides: draw groups of images, and learn from groups that have scores.

Everything random derives from (seed, iteration), so a step that is loaded from a checkpoint goes on exactly as the one
that saved it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dgpo_core.common.distributed import World
from dgpo_core.common.errors import UserError, out_of_memory
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.reading import shown
from dgpo_core.common.seeds import derive_seed
from dgpo_core.method import advantage as adv
from dgpo_core.method.ema import ema_, fast_decay
from dgpo_core.method.gating import counted
from dgpo_core.method.iteration import Iteration, Stopwatch, reward_metrics
from dgpo_core.method.kl import first_weight, next_weight
from dgpo_core.method.memory import within_memory
from dgpo_core.method.rollout import Check, nothing, rollout
from dgpo_core.method.update import References, Tally, Task, Update, candidate_timesteps, draw_timesteps
from dgpo_core.policy.base import AdapterName, Cond, Policy
from dgpo_core.rewards import weights_of
from dgpo_core.settings.config import Config, RewardTerm, RolloutConfig, TrainingConfig

ADAPTERS: tuple[AdapterName, ...] = ("current", "old", "ema")
NOTHING_TO_LEARN = (
    "all rewards were equal within every group, so there was nothing to learn: use a graded reward, larger groups or"
    " harder prompts"
)


@dataclass(frozen=True)
class StepSettings:
    """All settings that a step depends on. reward: what groups are scored by; empty for who only draws."""

    seed: int
    rollout: RolloutConfig
    training: TrainingConfig
    reward: Sequence[RewardTerm] = ()
    combine: str = "sum"
    dropout: float = 0.0

    @staticmethod
    def of(config: Config) -> "StepSettings":
        """Those of a run."""
        return StepSettings(
            config.seed, config.rollout, config.training, config.reward, config.combine, config.lora.dropout
        )


class Step:
    """Draws groups with a policy, and takes optimiser steps on scored ones; in between, anybody may score them.

    size: (height, width) of the images in pixels. check: called before every forward; what it raises ends the step with
    the weights as they were before it. tell: what is told where memory runs out.
    iteration: how many steps were taken. rollout_batch, micro_batch: samples at once, smaller since memory ran out.
    kl_weight: of the KL term in the next step.
    """

    def __init__(
        self,
        policy: Policy,
        settings: StepSettings,
        *,
        size: tuple[int, int],
        world: World | None = None,
        check: Check = nothing,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.policy, self.settings, self.size = policy, settings, size
        self.world = world or World(str(policy.device))
        self.reward_weights = weights_of(settings.reward)
        self.check, self.tell = check, tell
        drawn, t = settings.rollout, settings.training
        self.solver = policy.solver(drawn.solver, drawn.steps, *size, scheduler=drawn.scheduler)
        self.candidates = self._candidates()
        self.parameters = policy.trainable()
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=t.lr, betas=t.betas, weight_decay=t.weight_decay, foreach=True
        )
        self.iteration = 0
        self.kl_weight = first_weight(t)
        self.old_is_current = True
        self.rollout_batch, self.micro_batch = drawn.at_once, t.at_once

    def draw(
        self, mine: Sequence[tuple[int, Prompt]], drawn: Callable[[Group], None] = lambda group: None
    ) -> list[Group]:
        """One group for each (place in the iteration, prompt), not yet scored; `drawn` is given each at once.

        Each sample has a seed of its own, which depends on nothing but the run's seed, the step and its place.
        """
        if not mine:  # more processes than groups
            return []
        settings, k = self.settings.rollout, self.iteration
        rows = range(settings.group_size)
        seeds = [[derive_seed(self.settings.seed, "rollout", k, g, i) for i in rows] for g, _ in mine]
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

        _, self.rollout_batch = within_memory(work, self.rollout_batch, len(mine) * settings.group_size, self.tell)
        return done

    def learn(self, groups: Sequence[Group], places: Sequence[int], watch: Stopwatch | None = None) -> Iteration:
        """Compare the scored groups (of any sizes) and take one optimiser step; `places` are theirs in `draw`."""
        watch = watch or Stopwatch(self.policy.device)
        with watch.phase("encode"):
            conds, uncond = self.condition([group.prompt for group in groups])
        with watch.phase("update"):
            r, A = self._advantages(groups)
            # equal rewards have equal advantages, and only they have
            informative = [bool(adv.informative(row[None])) for row in A]
            # one that sees no source is the same for all, and in memory once
            of_each = [uncond.select([i]) for i in range(len(uncond))] if len(uncond) > 1 else [None] * len(groups)
            tasks = self._tasks(places, groups, A, list(zip(conds, of_each, strict=True)), informative)
            everywhere = sum(self.world.gather([len(groups)]))
            tally = self._accumulate(tasks, uncond, total=everywhere * self.settings.training.timesteps)
            moves = self.world.any(bool(tasks))
            norm = self._sum_gradients(tally) if moves else 0.0
            # the last message of a step: a process that dies leaves the others before the step, or behind all of it
            metrics, taught = self._metrics(places, groups, r, informative, tally, norm)
            self.check()
            if moves:
                self.optimizer.step()
        self.advance()
        if self.settings.training.kl_target:
            metrics["kl_weight"] = self.kl_weight
            self.kl_weight = next_weight(self.settings.training, self.kl_weight, metrics.get("kl"))
        warnings = [NOTHING_TO_LEARN] if metrics["informative"] == 0 else []
        return Iteration(list(groups), metrics, watch.seconds, warnings, taught)

    def _recompute(self) -> str:
        """For a sample whose activations do not fit."""
        if self.policy.is_gradient_checkpointing:
            return ""
        self.policy.enable_gradient_checkpointing()
        return "from here on activations are computed a second time" if self.policy.is_gradient_checkpointing else ""

    def _advantages(self, groups: Sequence[Group]) -> tuple[list[Tensor], list[Tensor]]:
        """Combined rewards r and advantages A of this process's groups, [G] each; G may differ from group to group."""
        t = self.settings.training
        weights, terms = self.reward_weights, self.settings.reward
        own = [{term.name: counted(g.scores, term, weights[term.name]) for term in terms} for g in groups]
        everyone = {name: torch.cat(self.world.gather([row[name] for row in own])) for name in weights}

        def total(values: Mapping[str, Tensor]) -> Tensor:
            return adv.weighted_sum([(weights[name], values[name]) for name in values])

        def advantage(r: Tensor, of_all: Tensor) -> Tensor:
            rows = r[None]
            return (adv.group_advantage(rows) if t.advantage_std == "group" else adv.global_advantage(rows, of_all))[0]

        r = [total(row) for row in own]
        if self.settings.combine == "sum":
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
        conds: Sequence[tuple[Cond, Cond | None]],
        informative: Sequence[bool],
    ) -> list[Task]:
        """Every group at each of the iteration's M timesteps. One of equal rewards has the gradient of what holds it to
        the base alone: without that it is left out."""
        t, seed, k = self.settings.training, self.settings.seed, self.iteration
        levels = draw_timesteps(self.candidates, t, self.policy.prediction, derive_seed(seed, "timesteps", k))
        held, tasks = References.of(t).kl, []
        for i, g in enumerate(places):
            if not informative[i] and not held:
                continue
            # equal rewards: exactly nothing, whatever was rounded
            A_g = A[i] if informative[i] else torch.zeros_like(A[i])
            for m, level in enumerate(levels):
                seed_of_noise = derive_seed(seed, "noise", k, g, m)
                tasks.append(Task(groups[i], A_g, conds[i][0], level, seed_of_noise, conds[i][1]))
        return tasks

    def _accumulate(self, tasks: Sequence[Task], uncond: Cond, total: int) -> Tally:
        """Gives the adapter the gradient of this process's tasks."""
        t = replace(self.settings.training, kl_weight=self.kl_weight)
        # an old policy of the same weights still predicts otherwise where the current one has dropout: it has none
        same = self.old_is_current and not self.settings.dropout
        update = Update(self.policy, t, uncond=uncond, old_is_current=same, check=self.check)

        def accumulate(micro_batch: int) -> Tally:
            self.optimizer.zero_grad(set_to_none=False)
            # for plug-ins that draw from torch's own generator: it is a function of seed and step, too
            torch.manual_seed(derive_seed(self.settings.seed, "torch", self.iteration, self.world.rank))
            return update.accumulate(tasks, total, micro_batch)

        samples = sum(len(task.group) for task in tasks)
        tally, self.micro_batch = within_memory(accumulate, self.micro_batch, samples, self.tell, self._recompute)
        return tally

    def _sum_gradients(self, tally: Tally) -> float:
        """Adds up the gradients of all processes and clips them; returns their norm. Raises UserError where they are no
        numbers."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        self.world.add_(gradients)
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        most = self.settings.training.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), most))
        if not math.isfinite(norm + tally.loss):
            raise UserError(
                f"The loss or its gradient is not a finite number in iteration {self.iteration + 1}: lower training.lr,"
                " training.beta or training.kl_weight; the state before this iteration is kept."
            )
        return norm

    def advance(self) -> None:
        """Count the step and let the two moving averages follow."""
        t = self.settings.training
        current = self.policy.adapter_state("current")
        decay = fast_decay(self.iteration, t.ema_fast_max, t.ema_fast_rate)
        self.iteration += 1
        ema_(self.policy.adapter_state("old"), current, decay)
        self.old_is_current = decay == 0.0
        if self.iteration < t.ema_slow_every:  # so that a short run does not save what it began with
            ema_(self.policy.adapter_state("ema"), current, 0.0)
        elif self.iteration % t.ema_slow_every == 0:
            ema_(self.policy.adapter_state("ema"), current, t.ema_slow)

    def _candidates(self) -> Tensor:
        t = self.settings.training
        kept = candidate_timesteps(self.solver.timesteps, self.policy.prediction, t.t_min)
        enough = len(kept) >= (t.timesteps if t.timestep_source == "rollout" else 1)
        if not enough:
            raise UserError(
                f"training.timesteps asks for {t.timesteps} different timesteps, but training.t_min {t.t_min:g} leaves"
                f" {len(kept)} of the {len(self.solver.timesteps)} of the roll-out: lower one of them."
            )
        return kept

    def condition(self, prompts: Sequence[Prompt]) -> tuple[list[Cond], Cond]:
        """Conditionings of the prompts and of the negative one, with their sources: see `Policy.condition`."""
        return self.policy.condition(prompts, self.settings.rollout.negative_prompt, self.size)

    def _metrics(
        self,
        places: Sequence[int],
        groups: Sequence[Group],
        r: Sequence[Tensor],
        informative: Sequence[bool],
        tally: Tally,
        norm: float,
    ) -> tuple[dict[str, float], dict[int, bool]]:
        """The numbers of the iteration over all processes, and which groups taught something, see `Iteration`."""
        scores = [group.scores for group in groups]
        every = self.world.gather(list(zip(scores, r, places, informative, strict=True)))
        tallies = self.world.gather([tally])
        rewards, taught = [row for _, row, _, _ in every], {place: flag for _, _, place, flag in every}
        metrics = {
            "reward": torch.cat(rewards).mean().item(),
            "reward_std": torch.stack([row.std(correction=0) for row in rewards]).mean().item(),
            "informative": sum(flag for _, _, _, flag in every) / len(every),
        }
        raw = [scores for scores, _, _, _ in every]
        for term in self.settings.reward:
            metrics |= reward_metrics(raw, term)
        return {**metrics, **sum(tallies, Tally()).means(), "grad_norm": norm}, taught

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
        info = {"step": self.iteration, "old_is_current": self.old_is_current}
        return tensors, info | ({"kl_weight": self.kl_weight} if self.settings.training.kl_target else {})

    def load_state(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """The inverse of `state`. Raises UserError for tensors of another model or LoRA, and for no trainer's state."""
        try:
            self._load_state(tensors, info)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            told = f"The checkpoint does not hold the state of a training ({type(error).__name__}: {shown(error)})."
            raise out_of_memory(error) or UserError(told) from error

    def _load_state(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        step, old_is_current, t = int(info["step"]), bool(info["old_is_current"]), self.settings.training
        kl_weight = float(info.get("kl_weight", first_weight(t))) if t.kl_target else t.kl_weight
        if not 0 <= kl_weight < math.inf:
            raise ValueError(f"kl_weight is {kl_weight}")
        with torch.no_grad():
            for name in ADAPTERS:
                for key, value in self.policy.adapter_state(name).items():
                    saved = tensors.get(f"{name}/{key}")
                    if saved is None or saved.shape != value.shape:
                        raise UserError(f"The checkpoint does not fit this model and LoRA: {name}/{key} differs.")
                    value.copy_(saved)
        for key, parameter in self.parameters.items():
            count = tensors.get(f"optimizer/step/{key}")
            if count is not None:
                moments = {name: tensors[f"optimizer/{name}/{key}"] for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {
                    "step": count.clone(),
                    **{name: value.to(parameter.device, copy=True) for name, value in moments.items()},
                }
        torch.set_rng_state(tensors["rng/cpu"])
        if "rng/cuda" in tensors and self.policy.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng/cuda"], self.policy.device)
        self.iteration, self.old_is_current, self.kl_weight = step, old_is_current, kl_weight
