"""Images of held-out prompts, drawn alike for every adapter from seeds that training never uses, and their scores."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dgpo_core.common.distributed import World
from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.seeds import derive_seed
from dgpo_core.diffusion.solvers import Solver
from dgpo_core.evaluation.scores import Evaluation, Measurement
from dgpo_core.method.memory import within_memory
from dgpo_core.method.rollout import Check, nothing, rollout
from dgpo_core.policy.base import AdapterName, Policy
from dgpo_core.rewards import Reward, Scoring, guard, score_groups
from dgpo_core.settings.config import Config

PART = 2**29  # bytes of images in memory at once

Row = tuple[Prompt, list[int]]
"""A prompt and the seeds of its images."""


def evaluation_set(prompts: Sequence[Prompt], images: int) -> list[Row]:
    """Prompts with the seeds of their images: `images` in all, spread evenly, the same for every adapter.

    They come in pairs, so that the diversity within a prompt can be seen: few images take the first prompts only.
    """
    prompts = prompts[: math.ceil(images / 2)]
    each, more = divmod(images, len(prompts))
    rows = []
    for i, prompt in enumerate(prompts):
        copies = each + (i < more)
        rows.append((prompt, [derive_seed("evaluation", i, copy) for copy in range(copies)]))
    return rows


@dataclass(frozen=True)
class Drawing:
    """How an evaluation's images are drawn. size: (height, width) in pixels. cfg: the guidance scale."""

    policy: Policy
    solver: Solver
    size: tuple[int, int]
    cfg: float
    negative_prompt: str

    @staticmethod
    def of(policy: Policy, config: Config, size: tuple[int, int]) -> "Drawing":
        """As the settings say. Where the solver is the roll-out's, it works on the noise levels of the roll-out's
        scheduler. Raises UserError for a solver that the policy does not know."""
        e, drawn = config.evaluation, config.rollout
        name = e.solver or drawn.solver
        solver = policy.solver(name, e.steps, *size, scheduler=drawn.scheduler if name == drawn.solver else "")
        return Drawing(policy, solver, size, e.cfg, drawn.negative_prompt)

    def draw(
        self, adapter: AdapterName | None, rows: Sequence[Row], batch: int = 0, check: Check = nothing
    ) -> list[Group]:
        """A group for each row, by an adapter or by the base (None); `batch` images per forward, 0 for all at once."""
        with self.policy.using(adapter):
            return rollout(
                self.policy,
                self.solver,
                [prompt for prompt, _ in rows],
                [seeds for _, seeds in rows],
                size=self.size,
                cfg=self.cfg,
                negative_prompt=self.negative_prompt,
                batch=batch,
                check=check,
            )


@dataclass
class HeldOut:
    """Held-out prompts with all that an evaluation of them needs; the processes share its work.

    judges: the rewards that score, by name. batch: images per forward, 0 for all at once, fewer since memory ran out.
    unload: whether the judges leave the accelerator afterwards. skip: leave out the groups that cannot be scored, as a
    training does that is told to. tell: what is told why groups are left out, and where memory runs out.
    """

    drawing: Drawing
    prompts: Sequence[Prompt]
    judges: Mapping[str, Reward]
    world: World
    batch: int = 0
    unload: bool = False
    check: Check = nothing
    skip: bool = False
    tell: Callable[[str], None] = lambda text: None

    @staticmethod
    def of(
        config: Config,
        policy: Policy,
        prompts: Sequence[Prompt],
        judges: Mapping[str, Reward],
        size: tuple[int, int],
        world: World,
        check: Check = nothing,
        tell: Callable[[str], None] = lambda text: None,
    ) -> "HeldOut":
        """As the settings say; see `Drawing.of`."""
        drawing, skip = Drawing.of(policy, config, size), config.on_bad_score == "skip"
        return HeldOut(
            drawing, prompts, judges, world, config.evaluation.at_once, config.memory.move, check, skip, tell
        )

    def texts(self, images: int) -> list[str]:
        """The prompts that this process draws in an evaluation of `images` images."""
        if not images or not self.prompts:
            return []
        return [prompt.text for prompt, _ in self.world.share(evaluation_set(self.prompts, images))]

    def draw(self, adapter: AdapterName | None, rows: Sequence[Row]) -> list[Group]:
        """A group for each row, by an adapter or by the base (None), in batches that fit."""

        def work(batch: int) -> list[Group]:
            return self.drawing.draw(adapter, rows, batch, self.check)

        images = sum(len(seeds) for _, seeds in rows)
        groups, self.batch = within_memory(work, self.batch, images, self.tell)
        return groups

    def score(
        self,
        adapter: AdapterName | None,
        images: int,
        *,
        iteration: int = 0,
        see: Callable[[int, Group], None] = lambda place, group: None,
    ) -> Evaluation:
        """Draw `images` images and score them by every judge.

        Drawn and scored in parts, so that the images of many large ones need not be in memory at once. see: called with
        the number of each prompt and its scored group, on the process that drew it. Raises UserError for a group that
        cannot be scored; where such are left out, if there is no other.
        """
        mine = self.world.share(list(enumerate(evaluation_set(self.prompts, images))))
        scores, failures = [], []
        for part in _parts(mine, self.drawing.size):
            # memory that runs out is met here: what is judged is drawn, and no judge is asked twice
            groups = self.draw(adapter, [row for _, row in part])
            for (i, _), group in zip(part, self.judged(groups), strict=True):
                if isinstance(group, UserError):
                    failures.append(str(group))
                    continue
                see(i, group)
                scores.append((i, group.scores))
        if self.unload:
            guard.idle(self.judges)
        rows, failures = self.world.gather(scores), self.world.gather(failures)
        if not rows:
            raise UserError(f"Nothing of an evaluation could be scored. {failures[0]}")
        if failures and self.world.leads:
            self.tell(f"Warning: {len(failures)} prompts are left out of an evaluation. {failures[0]}")
        return Evaluation.of(iteration, rows)

    def judged(self, groups: Sequence[Group]) -> Sequence[Group | UserError]:
        """The groups with all scores; where groups are left out, what was wrong with one instead."""
        if not self.skip:
            return score_groups(groups, self.judges)
        size = max(map(len, groups), default=0)
        with Scoring(self.judges, self.drawing.policy.device, size, one_by_one=True) as scoring:
            return scoring.results(groups)

    def measure(self, adapter: AdapterName | None, images: int, weights: Mapping[str, float]) -> Measurement:
        """The mean of `images` images by a weighted sum of the judges' scores."""
        return Measurement.of(self.score(adapter, images).total(weights))


def _parts(rows: Sequence[tuple[int, Row]], size: tuple[int, int]) -> Iterator[list[tuple[int, Row]]]:
    """The numbered rows in parts of about `PART` bytes of pixels."""
    most = max(1, PART // (12 * size[0] * size[1]))
    part: list[tuple[int, Row]] = []
    for row in rows:
        part.append(row)
        if sum(len(seeds) for _, (_, seeds) in part) >= most:
            yield part
            part = []
    if part:
        yield part
