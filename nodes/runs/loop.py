"""The Training Loop: the steps of the single nodes, with the same keys, so that each can go on from the other."""

from __future__ import annotations

import contextlib
import io
import time
from collections import Counter
from dataclasses import dataclass
from math import ceil

from PIL import Image

from dgpo_core.common.errors import UserError
from dgpo_core.common.pictures import reward_curve
from dgpo_core.method.advantage import informative
from dgpo_core.method.step import NOTHING_TO_LEARN
from dgpo_core.method.update import OLD, References
from dgpo_core.settings.config import RewardTerm

from ..common import host
from ..common.contact_sheet import combined, contact_sheet
from ..common.values import Groups, PolicyHandle, Prompts, Sampler, Training
from . import scoring, sessions
from .states import State
from .watching import Log, Watching

PREVIEW_EVERY, PREVIEW_WIDTH = 2.0, 1400  # seconds, pixels


@dataclass(frozen=True)
class Plan:
    """A whole run of the loop."""

    policy: PolicyHandle
    prompts: Prompts
    sampler: Sampler
    terms: tuple[RewardTerm, ...]
    settings: Training
    iterations: int
    save_every: int
    watching: Watching | None = None


def run(plan: Plan, progress: host.Progress) -> tuple[PolicyHandle, State, Log]:
    """Iterate until `plan.iterations` are done, from the newest state of the same settings that was kept.

    Where an alarm ends it, the state is the best one before. The log is empty where nothing is watched.
    """
    handle, state = _furthest(plan)
    if handle.step < plan.iterations:
        scoring.require_ready(plan.terms, plan.prompts.prompts)
    log = Log(plan.watching)
    log.recall(handle, state)
    best = log.best(handle, state) if log.history else handle
    shown, start, first = 0.0, time.monotonic(), handle.step
    progress.at(handle.step)
    try:
        while handle.step < plan.iterations and not log.stopped:
            groups = _draw(plan, handle)
            handle, state = sessions.learn(handle, groups, plan.settings, host.stop_if_cancelled)
            if log.look(handle):
                best = handle
                sessions.keep(handle, state)
            picture = None
            if time.monotonic() - shown > PREVIEW_EVERY or handle.step == plan.iterations:
                shown, picture = time.monotonic(), preview(groups, state, log)
            pace = (time.monotonic() - start) / (handle.step - first)
            progress.at(handle.step, picture, status(state, plan.iterations, pace, log))
            if handle.step % plan.save_every == 0:
                sessions.keep(handle, state)
                sessions.use(best)
    finally:  # also after Cancel, which is no Exception in every version of ComfyUI
        if handle.step:
            sessions.keep(handle, state)
            sessions.use(best)
    if log.stopped:
        handle, state = _before_the_decline(log, handle, state)
    return handle, state, log


def _before_the_decline(log: Log, handle: PolicyHandle, state: State) -> tuple[PolicyHandle, State]:
    """After an alarm: the best state, or where it is no longer kept, the nearest one that is. The log says which."""
    best, kept = log.best(handle, state), None
    with contextlib.suppress(UserError):
        kept = best.step, sessions.state_of(best)
    kept = kept or sessions.store(handle.spec).nearest(state.line, best.step) or (handle.step, state)
    log.given_out(kept[0], best.step)
    return log.handle(handle, state, kept[0]), kept[1]


def _draw(plan: Plan, handle: PolicyHandle) -> Groups:
    places, cancelled = plan.prompts.at(handle.step), host.stop_if_cancelled
    return sessions.draw_scored(handle, places, plan.sampler, handle.step, plan.terms, cancelled)


def _furthest(plan: Plan) -> tuple[PolicyHandle, State]:
    """The last state of this very plan that is kept: keys tell without drawing anything."""
    handle = plan.policy if plan.policy.state else sessions.store(plan.policy.spec).at(0)
    kept, last = handle, min(plan.iterations, sessions.furthest(handle.spec))
    while handle.step < last:
        host.stop_if_cancelled()
        handle = sessions.foretell(handle, plan.prompts.at(handle.step), plan.sampler, plan.terms, plan.settings)
        if sessions.is_kept(handle):
            kept = handle
    return kept, sessions.state_of(kept)


def require_scores(groups: Groups) -> None:
    """Raises UserError for groups that nobody has scored."""
    if not groups.terms:
        raise UserError("These groups have no scores: put a Reward Scorer, Scores from Graph or Human Ranker before.")


def update_steps(groups: Groups, settings: Training) -> int:
    """How many steps the bar of an update has: its forwards, as `Update` takes them, and the optimiser's step.

    There are a few forwards less while the old policy is the current one.
    """
    t, references = settings.training, References.of(settings.training)
    compared = {references.logit, references.kl, OLD if t.clip > 0 else None} - {None}
    anchored = {references.kl} - {None}
    kinds = Counter((bool(informative(combined(group, groups)[None])), len(group)) for group in groups.groups)
    steps = 1
    for (prefers, size), number in kinds.items():
        asked = compared if prefers else anchored
        if not asked:  # nothing to learn from them
            continue
        parts = ceil(number * t.timesteps / max(1, t.micro_batch // size)) * ceil(size / t.micro_batch)
        before = int(prefers and size > t.micro_batch)  # the logit of a group that is cut
        steps += parts * (1 + before + sum(1 if reference.cfg == 1 else 2 for reference in asked))
    return steps


def curve(state: State, log: Log) -> Image.Image:
    """The reward over the iterations, and beside it what is watched."""
    return Image.open(io.BytesIO(reward_curve([*state.history, *log.records], log.title))).convert("RGB")


def preview(groups: Groups, state: State, log: Log) -> Image.Image:
    """Contact sheet and curve, one above the other."""
    sheet, plot = contact_sheet(groups), curve(state, log)
    sheet.thumbnail((PREVIEW_WIDTH, sheet.height))
    width = min(PREVIEW_WIDTH, max(sheet.width, plot.width))
    plot = plot.resize((width, round(plot.height * width / plot.width)))
    both = Image.new("RGB", (width, sheet.height + plot.height), "white")
    both.paste(sheet, (0, 0))
    both.paste(plot, (0, sheet.height))
    return both


def status(state: State, iterations: int, pace: float, log: Log) -> str:
    """Iteration, reward, time left; below it the last evaluation."""
    left = round(pace * (iterations - state.step))
    reward = state.history[-1]["reward"]
    text = f"iteration {state.step} of {iterations} · reward {reward:.3f} · {left // 60}:{left % 60:02d} left"
    if not state.history[-1]["informative"]:
        text = f"{text} · nothing to learn: all scores of a group are equal"
    return "\n".join([text, *filter(None, [log.text()])])


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
