"""The Training Loop: the steps of the single nodes, with the same keys, so that each can go on from the other."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import NamedTuple

from PIL import Image

from dgpo_core.common.errors import UserError
from dgpo_core.common.pictures import reward_curve
from dgpo_core.method.advantage import informative
from dgpo_core.method.step import NOTHING_TO_LEARN
from dgpo_core.method.update import References
from dgpo_core.people import told as people
from dgpo_core.settings.config import PEOPLE, RewardTerm

from ..common import host
from ..common.contact_sheet import close_up, combined
from ..common.values import Groups, PolicyHandle, Prompts, Sampler, Training
from . import forecast, keys, sessions
from .finishing import FINISHING, Finished
from .judges import Judge
from .states import State
from .watching import Log, Watching

NO_SCORES = "These groups have no scores: put a Reward Scorer, Scores from Graph or Human Ranker before."
PREVIEW_EVERY = 2.0  # seconds
GAIN_ROUNDS = 5  # at either end, at most, whose mean is compared


@dataclass(frozen=True)
class Plan:
    """A whole run of the loop. seconds: for how long in all, with those of earlier presses of Run."""

    policy: PolicyHandle
    prompts: Prompts
    sampler: Sampler
    judge: Judge
    settings: Training
    iterations: int
    save_every: int
    watching: Watching | None = None
    seconds: float = math.inf


class Done(NamedTuple):
    """What a run of the loop came to. said: in a few words, for who looks at the node."""

    policy: PolicyHandle
    state: State
    log: Log
    said: str


class _Clock:
    """How long a plan has been worked on: what its states say they took, and what has gone by since `round_` began."""

    def __init__(self, plan: Plan) -> None:
        self.limited, self.total, self.began = plan.seconds < math.inf, plan.seconds, time.monotonic()

    def used(self, state: State) -> float:
        return sum(record.get("seconds", 0.0) for record in state.history) + time.monotonic() - self.began

    def left(self, state: State) -> float:
        return self.total - self.used(state)

    def lap(self) -> dict[str, float]:
        """What to note of the round that ends; nothing where time does not count."""
        now = time.monotonic()
        took, self.began = now - self.began, now
        return {"seconds": round(took, 3)} if self.limited else {}


class _Course:
    """A run of the loop on its way: where it is, and the best state so far."""

    def __init__(self, plan: Plan, progress: host.Progress) -> None:
        self.plan, self.progress = plan, progress
        self.handle, self.state = _furthest(plan)
        self.clock = _Clock(plan)
        if self.unfinished:
            plan.judge.require_ready(plan.prompts.prompts)
        self.log = Log(plan.watching)
        self.log.recall(self.handle, self.state)
        self.best = self.log.best(self.handle, self.state) if self.log.history else self.handle
        self.first, self.started, self.shown = self.handle.step, time.monotonic(), 0.0
        self.clock.lap()

    @property
    def unfinished(self) -> bool:
        """Whether there are iterations, and there is time, left."""
        return self.handle.step < self.plan.iterations and self.clock.left(self.state) > 0

    def begin(self) -> None:
        """Says what it needs and how long it takes."""
        plan, told = self.plan, ""
        if self.unfinished:
            rounds = 0 if self.clock.limited else plan.iterations - self.handle.step
            told = forecast.tell(self.handle.spec, plan.prompts, plan.sampler, plan.settings, rounds)
        self._show(text=told)

    def iterate(self, check: Callable[[], None]) -> bool:
        """One iteration; False where nobody said anything of its groups."""
        plan = self.plan
        places, left = plan.prompts.at(self.handle.step), partial(self.clock.left, self.state)
        scored = plan.judge.groups(self.handle, places, plan.sampler, left, check)
        if scored is None:
            return False
        note = partial(_note, scored.said, self.clock)
        self.handle, self.state = sessions.learn(self.handle, scored.groups, plan.settings, check, note)
        if self.log.look(self.handle):
            self.best = self.handle
            sessions.keep(self.handle, self.state)
        self._tell(scored.groups)
        if self.handle.step % plan.save_every == 0:
            self.keep()
        return True

    def keep(self) -> None:
        """The state goes to disk, and the best one stays there."""
        sessions.keep(self.handle, self.state)
        sessions.use(self.best)

    def _tell(self, groups: Groups) -> None:
        picture, plan = None, self.plan
        if time.monotonic() - self.shown > PREVIEW_EVERY or not self.unfinished:
            self.shown, picture = time.monotonic(), preview(groups, self.state, self.log)
        pace = (time.monotonic() - self.started) / (self.handle.step - self.first)
        left = self.clock.left(self.state) if self.clock.limited else pace * (plan.iterations - self.handle.step)
        self._show(picture, status(self.state, plan, left, self.log))

    def _show(self, picture: Image.Image | None = None, text: str = "") -> None:
        clock = self.clock
        done = min(clock.used(self.state), self.plan.seconds) if clock.limited else self.handle.step
        self.progress.at(round(done), picture, text)


def run(plan: Plan, progress: host.Progress) -> Done:
    """Iterate until `plan.iterations` are done or its time is over, from the newest state of the same settings that
    was kept.

    Where an alarm ends it, the state is the best one before. The log is empty where nothing is watched.
    """
    course, ending = _Course(plan, progress), ""
    course.begin()
    try:
        with FINISHING.training(progress.node) as asked:

            def check() -> None:
                host.stop_if_cancelled()
                if asked.is_set():
                    raise Finished

            while course.unfinished and not course.log.stopped:
                if not course.iterate(check):
                    ending = _unanswered(course, progress.node)
                    break
    except Finished:
        ending = f"Finished at {course.handle.step}, as you asked: Run goes on."
    except BaseException:  # Cancel, which is no Exception in every version of ComfyUI, and errors
        progress.say(f"Stopped at {course.handle.step}: Run goes on.")
        raise
    finally:
        progress.close()
        if course.handle.step:
            course.keep()
    handle, state, log = course.handle, course.state, course.log
    if log.stopped:
        handle, state = _before_the_decline(log, handle, state)
    return Done(handle, state, log, "\n".join(filter(None, [ending, summary(plan, state, course.first, log)])))


def _unanswered(course: _Course, node: str) -> str:
    """What to say where nobody answered in time. Raises UserError before the first round: there is nothing to save."""
    if not course.handle.step:
        raise UserError("Nobody answered in time, and nothing was learned yet: press Run to be asked again.")
    FINISHING.given_up(node)
    return f"Nobody answered in time, so it ended at {course.handle.step}: Run asks again."


def _note(said: Mapping[str, float], clock: _Clock) -> dict[str, float]:
    return {**said, **clock.lap()}


def _before_the_decline(log: Log, handle: PolicyHandle, state: State) -> tuple[PolicyHandle, State]:
    """After an alarm: the best state, or where it is no longer kept, the nearest one that is. The log says which."""
    best, kept = log.best(handle, state), None
    with contextlib.suppress(UserError):
        kept = best.step, sessions.state_of(best)
    kept = kept or sessions.store(handle.spec).nearest(state.line, best.step) or (handle.step, state)
    log.given_out(kept[0], best.step)
    return log.handle(handle, state, kept[0]), kept[1]


def _furthest(plan: Plan) -> tuple[PolicyHandle, State]:
    """The last state of this very plan that is kept: keys tell without drawing anything."""
    handle = plan.policy if plan.policy.state else sessions.store(plan.policy.spec).at(0)
    kept, last = handle, min(plan.iterations, sessions.furthest(handle.spec))
    while handle.step < last:
        host.stop_if_cancelled()
        places = plan.prompts.at(handle.step)
        sizes = [plan.sampler.rollout.group_size] * len(places)
        scored = plan.judge.foretell(handle, keys.drawn(handle, places, plan.sampler), sizes)
        if scored is None:
            break
        handle = keys.learned(handle, scored, plan.settings)
        if sessions.is_kept(handle):
            kept = handle
    return kept, sessions.state_of(kept)


def require_scores(groups: Groups) -> None:
    """Raises UserError for groups that nobody has scored."""
    if not groups.terms:
        raise UserError(NO_SCORES)


def update_steps(groups: Groups, settings: Training) -> int:
    """How many steps the bar of an update has: its forwards, as `Update` takes them, and the optimiser's step.

    There are a few forwards less while the old policy is the current one.
    """
    t, references, at_once = settings.training, References.of(settings.training), settings.training.at_once
    compared, anchored = references.asked(t.clip), [references.kl] if references.kl else []
    kinds = Counter((bool(informative(combined(group, groups)[None])), len(group)) for group in groups.groups)
    steps = 1
    for (prefers, size), number in kinds.items():
        asked = compared if prefers else anchored
        if not asked:  # nothing to learn from them
            continue
        parts = ceil(number * t.timesteps / max(1, at_once // size)) * ceil(size / at_once)
        before = int(prefers and size > at_once)  # the logit of a group that is cut
        steps += parts * (1 + before + sum(reference.forwards for reference in asked))
    return steps


def curve(state: State, log: Log) -> Image.Image:
    """The reward over the iterations, and beside it what is watched."""
    return people.curve(state.history) or reward_curve([*state.history, *log.records], log.title)


def preview(groups: Groups, state: State, log: Log) -> Image.Image:
    """A few images, large, and the curve, one above the other."""
    sheet, plot = close_up(groups), curve(state, log)
    width = sheet.width
    plot = plot.resize((width, round(plot.height * width / plot.width)))
    both = Image.new("RGB", (width, sheet.height + plot.height), "white")
    both.paste(sheet, (0, 0))
    both.paste(plot, (0, sheet.height))
    return both


def status(state: State, plan: Plan, left: float, log: Log) -> str:
    """Iteration, reward, time left; below it the last evaluation."""
    of = f" of {plan.iterations}" if plan.seconds == math.inf else ""
    reward, by_people = state.history[-1]["reward"], people.said(state.history)
    seconds, so_far = max(0, round(left)), f" · {by_people}" if by_people else f" · reward {reward:.3f}"
    text = f"iteration {state.step}{of}{so_far} · {seconds // 60}:{seconds % 60:02d} left"
    if not state.history[-1]["informative"]:
        text = f"{text} · nothing to learn: all scores of a group are equal"
    return "\n".join([text, *filter(None, [log.text()])])


def summary(plan: Plan, state: State, first: int, log: Log) -> str:
    """What a run of the loop did, from the round `first` on, and what came of it."""
    if not state.history:
        return "Nothing was learned: no round was finished."
    if state.step == first:
        made = f"Reused from before: {_rounds(first)}, nothing was drawn anew."
    else:
        made = f"{_rounds(state.step)} done{f', {state.step - first} of them now' if first else ''}."
    return "\n".join([made, *filter(None, [gain(state, plan.judge.terms), log.text()])])


def gain(state: State, terms: Sequence[RewardTerm]) -> str:
    """What the pictures scored in the first rounds and in the newest; "" where there is nothing to compare."""
    if any(term.name in PEOPLE for term in terms):
        return f"{said[0].upper()}{said[1:]}." if (said := people.said(state.history)) else ""
    rewards = [record["reward"] for record in state.history]
    few = min(GAIN_ROUNDS, len(rewards) // 2)
    if not few:
        return ""
    before, after = (sum(rows) / few for rows in (rewards[:few], rewards[-few:]))
    return f"Reward {before:.3f} in the first {few}, {after:.3f} in the newest {few} ({after - before:+.3f})."


def _rounds(number: int) -> str:
    return f"{number} round" if number == 1 else f"{number} rounds"


def describe(state: State, log: Log) -> str:
    """The numbers of the last iteration, one per line, and the last evaluation."""
    if not state.history:
        return "not trained yet"
    last = state.history[-1]
    lines = [f"{name}: {_short(value)}" for name, value in last.items()]
    lines += [f"Note: {NOTHING_TO_LEARN}."] if last["informative"] == 0 else []
    return "\n".join([*lines, *filter(None, [log.text()])])


def _short(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"
