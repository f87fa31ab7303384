"""DGPO, one iteration at a time: rollout, reward, advantage, update (arXiv 2510.08425)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from dgpo_core.common.distributed import World
from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt, PromptStream
from dgpo_core.method.iteration import Iteration, Stopwatch
from dgpo_core.method.offline import RatedGroups
from dgpo_core.method.rollout import Check, nothing
from dgpo_core.method.step import Step, StepSettings
from dgpo_core.method.turns import Turns
from dgpo_core.policy.base import Policy
from dgpo_core.rewards import Reward, Scoring, guard
from dgpo_core.settings.config import Config

EMPTY_IN_A_ROW = 10
"""Iterations without a group that can be scored after which `on_bad_score` "skip" gives up: it is no chance then."""

NOTHING_SCORED = "no group could be scored, so the weights stay as they are"


class Trainer:
    """Trains `policy`'s adapter on `rewards` over `prompts`, step by step; `iterate` is the whole algorithm.

    rewards: by name, those of `config.reward`. size, check, tell: see `Step`.
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
        self.policy, self.rewards, self.config = policy, rewards, config
        self.step = Step(policy, StepSettings.of(config), size=size, world=world, check=check, tell=tell)
        self.world = self.step.world
        order_seed = config.seed if config.data.order_seed < 0 else config.data.order_seed
        self.stream = PromptStream(prompts, config.data.groups_per_iteration, order_seed)
        self.turns = Turns.of(self.stream, config.data.pass_over)
        self.empty_in_a_row = 0  # iterations without a group that could be scored

    @property
    def iteration(self) -> int:
        """How many iterations are done."""
        return self.step.iteration

    def texts(self) -> Iterator[str]:
        """The negative prompt, and what this process will be asked to draw from here on, each prompt once, in order."""
        yield self.policy.negative_text(self.config.rollout.negative_prompt)
        seen: set[str] = set()
        every = {prompt.text for prompt in self.stream.prompts}
        for prompt in self.turns.ahead(range(self.iteration, self.config.iterations), self.world):
            if prompt.text not in seen:
                seen.add(prompt.text)
                yield prompt.text
            if len(seen) == len(every):  # a run of an hour may be set to a million iterations
                return

    def iterate(self) -> Iteration:
        """One iteration: draw groups, score them, compare them, take one optimiser step."""
        watch = Stopwatch(self.policy.device)
        drawn = self.turns.next(self.iteration)
        mine = self.world.share(list(enumerate(drawn.prompts)))
        with watch.phase("encode"):
            self.step.condition([prompt for _, prompt in mine])
        with self._scoring() as scoring:
            with watch.phase("rollout"):
                groups = self.step.draw(mine, scoring.start)
            with watch.phase("reward"):
                scored, skipped = self._usable(mine, scoring.results(groups))
        if skipped and not self.world.any(bool(scored)):
            self.turns.take(drawn, {})
            return self._without_any(skipped, watch)
        self.empty_in_a_row = 0
        done = self.step.learn([group for _, group in scored], [place for place, _ in scored], watch)
        self.turns.take(drawn, done.taught)
        return done.without(skipped) if skipped else done

    def _without_any(self, skipped: Sequence[str], watch: Stopwatch) -> Iteration:
        """An iteration whose groups all failed takes no step; raises UserError after `EMPTY_IN_A_ROW` of them."""
        self.empty_in_a_row += 1
        if self.empty_in_a_row >= EMPTY_IN_A_ROW:
            raise UserError(f"No group of {EMPTY_IN_A_ROW} iterations in a row could be scored. {skipped[0]}")
        self.step.advance()
        return Iteration([], {"informative": 0.0}, watch.seconds, [NOTHING_SCORED]).without(skipped)

    def iterate_rated(self, rated: RatedGroups) -> Iteration:
        """One iteration without a roll-out: take groups that people rated, compare them, take one optimiser step."""
        watch = Stopwatch(self.policy.device)
        mine = self.world.share(list(enumerate(rated.at(self.iteration))))
        groups = []
        with watch.phase("images"):
            for _, group in mine:
                self.step.check()
                groups.append(rated.load(group, self.policy, self.step.size))
        return self.step.learn(groups, [place for place, _ in mine], watch)

    def _scoring(self) -> Scoring:
        skip = self.config.on_bad_score == "skip"
        return Scoring(self.rewards, self.policy.device, self.config.rollout.group_size, one_by_one=skip)

    def _usable(
        self, mine: Sequence[tuple[int, Prompt]], outcomes: Sequence[Group | UserError]
    ) -> tuple[list[tuple[int, Group]], list[str]]:
        """The scored groups with their places; and of all processes, why other groups are left out.

        With offloading, reward models leave the accelerator.
        """
        if self.config.memory.move:
            guard.idle(self.rewards)
        scored = [(g, group) for (g, _), group in zip(mine, outcomes, strict=True) if isinstance(group, Group)]
        if self.config.on_bad_score == "stop":
            return scored, []
        return scored, self.world.gather([str(error) for error in outcomes if isinstance(error, UserError)])

    # --- state -------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a run needs to go on, as flat tensors and JSON."""
        tensors, info = self.step.state()
        return tensors, info | self.turns.state()

    def load_state(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """The inverse of `state`. Raises UserError as `Step.load_state`."""
        self.step.load_state(tensors, info)
        self.turns.load_state(info)
