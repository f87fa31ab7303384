"""`python -m dgpo_core.demo.rater`: how many groups must a person rate until the embedded model is better by 0.2?

The person is simulated: sees what the verifier sees, not quite, and says it as people do, by a ranking with ties, by
the best image of a group alone, by thumbs, or by pairs. Success is measured on held-out prompts after every iteration,
with the strict verifier. By pairs, a group costs as many looks as it has pairs; the table says how many.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from dgpo_core.common.distributed import World
from dgpo_core.common.files import require_writable, write_atomic
from dgpo_core.common.group import Group
from dgpo_core.common.seeds import derive_seed, noise
from dgpo_core.evaluation.held_out import HeldOut
from dgpo_core.evaluation.scores import evaluation_weights
from dgpo_core.method.trainer import Trainer
from dgpo_core.people.apprentice import Apprentice
from dgpo_core.people.ask import ask
from dgpo_core.people.pairs import next_pair, pairs_wanted
from dgpo_core.people.preferences import scores_from
from dgpo_core.people.questions import Answer, Question, Questions
from dgpo_core.rewards.base import GroupReward
from dgpo_core.rewards.shapes import ShapesGraded
from dgpo_core.rewards.taste.features import BuiltIn
from dgpo_core.runs import assemble
from dgpo_core.settings.command_line import command, parse
from dgpo_core.settings.config import (
    Config,
    CountOrZero,
    Fraction,
    HumanConfig,
    NotNegative,
    Positive,
    Range,
    RewardTerm,
)
from dgpo_core.settings.presets import load_preset

Mode = Literal["full", "best", "thumbs", "pairs"]
MODES: tuple[Mode, ...] = ("full", "best", "thumbs", "pairs")
GOOD, BAD = 0.9, 0.5  # what a thumb goes up for, and down
RATER = "rater"


class SimulatedRater(GroupReward):
    """Rates groups as a person might.

    mode: "full", a ranking of all images; "best", a click on the best one; "thumbs", up, down or neither for each;
    "pairs", the better one of two or a tie, `pairs` times (0: as many as people are asked about by default).
    slip: standard deviation of what is added to the verifier's graded score of an image, which is 0 to 1. ties: images
    whose scores are this close to the first of their rank, or to each other in a pair, are tied. seed: of the slips,
    which also depend on the seeds of the group's images, so that the same group is always rated in the same way.
    """

    def __init__(
        self, mode: Mode = "full", slip: float = 0.1, ties: float = 0.1, seed: int = 0, pairs: int = 0
    ) -> None:
        super().__init__()
        self.mode, self.slip, self.ties, self.seed, self.pairs = mode, slip, ties, seed, pairs
        self.verifier = ShapesGraded()

    def score_groups(self, groups: Sequence[Group]) -> Tensor:
        """The scores that follow from the answers, float32 [B]; equal in a group where nothing was told apart."""
        rows = [scores_from(self.answer(group), len(group)) or [0.0] * len(group) for group in groups]
        return torch.tensor([score for row in rows for score in row])

    def answer(self, group: Group) -> Mapping[str, Any]:
        """What is said about a group, in the words of `preferences`."""
        n = len(group)
        seen = self.verifier.score(group.images, [group.prompt.text] * n, [group.prompt.metadata] * n)
        slips = self.slip * noise(derive_seed("rater", self.seed, *group.seeds), (n,))
        rated: list[float] = (seen + slips).tolist()
        if self.mode == "thumbs":
            return {"thumbs": [(score > GOOD) - (score < BAD) for score in rated]}
        if self.mode == "best":
            return {"ranking": [[max(range(n), key=rated.__getitem__)]]}
        if self.mode == "pairs":
            return {"pairs": compared(rated, self.ties, pairs_wanted(n, self.pairs))}
        return {"ranking": ranks(rated, self.ties)}


def compared(scores: Sequence[float], ties: float, most: int) -> list[list[Any]]:
    """What is said about one pair after the other, as `people.pairs` chooses them."""
    said: list[list[Any]] = []
    while pair := next_pair(said, len(scores), most):
        better, worse = sorted(pair, key=scores.__getitem__, reverse=True)
        said.append([better, "=" if scores[better] - scores[worse] <= ties else ">", worse])
    return said


def ranks(scores: Sequence[float], ties: float) -> list[list[int]]:
    """Indices, best first; who is at most `ties` below the first of a rank shares it."""
    by_rank: list[list[int]] = []
    for i in sorted(range(len(scores)), key=scores.__getitem__, reverse=True):
        if by_rank and scores[by_rank[-1][0]] - scores[i] <= ties:
            by_rank[-1].append(i)
        else:
            by_rank.append([i])
    return by_rank


class Taught(GroupReward):
    """A rater who is asked as people are, with a taste that learns from the answers and gives some of them.

    answers: groups that the rater is asked about at most, 0 for no end; audit: see `Apprentice`.
    """

    def __init__(self, rater: SimulatedRater, folder: Path, answers: int, audit: float) -> None:
        super().__init__()
        self.rater, self.folder = rater, folder
        self.apprentice = Apprentice(folder, BuiltIn(), answers, audit, tell=lambda said: None)

    def score_groups(self, groups: Sequence[Group]) -> Tensor:
        """The scores that follow from the rater's answers and the taste's, float32 [B]."""
        keys = [f"{derive_seed(group.prompt.text, *group.seeds):x}" for group in groups]
        mode = "pairs" if self.rater.mode == "pairs" else "rank"
        by_key = dict(zip(keys, groups, strict=True))
        answer = ask(
            _Answering(self.rater, by_key), groups, keys, self.folder, {}, mode=mode, pairs=self.rater.pairs,
            timeout_s=0, check=lambda: None, apprentice=self.apprentice,
        )  # fmt: skip
        assert answer  # the rater always answers
        return torch.tensor([score for row in answer.rows([len(group) for group in groups]) for score in row])

    def given(self) -> int:
        """Answers that the rater has given: groups, or pairs."""
        return self.apprentice.given


class _Answering(Questions):
    """Questions that the rater answers at once. groups: by the key that the names of their images begin with."""

    def __init__(self, rater: SimulatedRater, groups: Mapping[str, Group]) -> None:
        super().__init__(lambda event, data: None)
        self.rater, self.groups = rater, groups

    def ask(
        self,
        question: Question,
        timeout_s: float,
        check: Callable[[], None],
        save: Callable[[Answer], None] = lambda answer: None,
    ) -> Answer:
        asked = [self.groups[str(group.images[0]["filename"]).partition("-")[0]] for group in question.groups]
        answer = Answer(tuple(self.rater.answer(group) for group in asked))
        save(answer)
        return answer


@dataclass(frozen=True)
class RaterConfig:
    """What is simulated."""

    modes: tuple[Mode, ...] = MODES
    """Ways to rate."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    groups: Annotated[int, Range(1)] = 4
    """Groups per iteration."""
    size: Annotated[int, Range(2)] = 8
    """Images per group."""
    lr: Positive = 1e-3
    """Learning rate."""
    slip: NotNegative = 0.1
    """Standard deviation of the rater's error; scores are 0 to 1."""
    ties: NotNegative = 0.1
    """Scores that are this close are tied in a ranking, or a pair."""
    pairs: CountOrZero = 0
    """Pairs per group; 0 takes one and a half times its size."""
    taste: bool = False
    """A taste learns from the answers and gives those that it is sure of."""
    answers: CountOrZero = 60
    """With a taste: groups that the rater is asked about at most, 0 for no end."""
    audit: Fraction = HumanConfig.audit
    """With a taste: share of the groups it is sure of that the rater is asked about all the same."""
    gain: Positive = 0.2
    """What success must rise by."""
    reach: Fraction = 0.0
    """Go on until success is this, and count the answers until then, too; 0 ends after the gain."""
    most: CountOrZero = 60
    """Iterations after which a run gives up."""
    images: Annotated[int, Range(2)] = 300
    """Images per measurement."""
    every: Annotated[int, Range(1)] = 1
    """Iterations between two measurements."""
    json: Path | None = None
    """Write every measurement of every run to this file."""


@dataclass(frozen=True)
class Outcome:
    """One run. rated: answers (groups, or pairs) until the gain was reached, reached: until `reach` was, None where it
    was not; given: all that were given; success: before, and by measurement; asked: answers by measurement."""

    mode: str
    seed: int
    rated: int | None
    success: list[float]
    reached: int | None = None
    given: int = 0
    asked: list[int] = field(default_factory=list)


def run(options: RaterConfig, mode: Mode, seed: int) -> Outcome:
    """Trains from the base on what one rater says until the gain, and `reach`, are reached."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(options, mode, seed, Path(folder))


def _run(options: RaterConfig, mode: Mode, seed: int, folder: Path) -> Outcome:
    config = _settings(options, seed)
    world = World("cpu")
    held_out, judges = assemble.held_out_prompts(config), assemble.evaluation_rewards(config, {}, world.device)
    policy, size = assemble.load_model(config, world.device)
    rater = SimulatedRater(mode, options.slip, options.ties, seed, options.pairs)
    taught = Taught(rater, folder, options.answers, options.audit) if options.taste else None
    prompts = assemble.training_prompts(config)
    trainer = Trainer(policy, prompts, {RATER: taught or rater}, config, size=size, world=world)
    measured, weights = HeldOut.of(config, policy, held_out, judges, size, world), evaluation_weights(config)

    def success(adapter: Literal["current"] | None) -> float:
        mean = measured.measure(adapter, options.images, weights).mean
        return round(mean, 6)  # 180 of 200 are 0.9, not a little less

    each = pairs_wanted(options.size, options.pairs) if mode == "pairs" else 1
    successes, asked = [success(None)], [0]
    while trainer.iteration < options.most:
        trainer.iterate()
        if trainer.iteration % options.every:
            continue
        successes.append(success("current"))
        asked.append(taught.given() if taught else trainer.iteration * options.groups * each)
        if max(successes) >= max(successes[0] + options.gain, options.reach):
            break
    rated, reached = (
        next((count for count, now in zip(asked, successes, strict=True) if now >= wanted), None)
        for wanted in (successes[0] + options.gain, options.reach or 2)
    )
    return Outcome(mode, seed, rated, successes, reached, asked[-1], asked)


def _settings(options: RaterConfig, seed: int) -> Config:
    """The quickstart's, with as many images as a person would look at."""
    config = load_preset("quickstart")
    return replace(
        config,
        seed=seed,
        reward=(RewardTerm(RATER),),
        data=replace(config.data, groups_per_iteration=options.groups),
        rollout=replace(config.rollout, group_size=options.size),
        training=replace(config.training, lr=options.lr),
    )


def simulate(options: RaterConfig) -> Iterator[Outcome]:
    """Every mode with every seed."""
    for mode in options.modes:
        for seed in options.seeds:
            yield run(options, mode, seed)


def table(outcomes: Sequence[Outcome], options: RaterConfig) -> str:
    """One line per mode: the mean of the groups rated, and those of each seed."""
    lines = [f"groups of {options.size} rated until success is {options.gain:g} higher (mean; by seed)"]
    for mode in options.modes:
        rated = [outcome.rated for outcome in outcomes if outcome.mode == mode]
        reached = [groups for groups in rated if groups is not None]
        middle = f"{mean(reached):.0f}" if len(reached) == len(rated) else "-"
        each = ", ".join(f"more than {options.most * options.groups}" if n is None else str(n) for n in rated)
        pairs = f" of {pairs_wanted(options.size, options.pairs)} pairs each" if mode == "pairs" else ""
        lines.append(f"{mode:7} {middle:>5}  ({each}){pairs}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 after a user's mistake."""
    return command(lambda: parse(RaterConfig, argv, "python -m dgpo_core.demo.rater", __doc__), _rate)


def _rate(options: RaterConfig) -> None:
    outcomes = []
    if options.json:
        require_writable(options.json)
    for outcome in simulate(options):
        outcomes.append(outcome)
        told = outcome.mode, outcome.seed, outcome.rated, outcome.reached, f"{outcome.success[-1]:.3f}"
        print(time.strftime("%H:%M:%S"), *told, flush=True)
        if options.json:
            write_atomic(options.json, json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")
    print(table(outcomes, options))


if __name__ == "__main__":
    sys.exit(main())
