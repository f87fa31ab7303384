"""What settings leave open by "auto", chosen for a number of free bytes by the same count that `fit` makes.

Nothing is chosen that changes what is learned, but one: batches add up to the same gradient (but for rounding), and
what is computed again is the same. A quantised base is another base, so it is one only where the whole one does not
fit at its smallest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from dgpo_core.benchmark.advice import GAPS, GIB, SHORT, Counted, evaluated_at_once
from dgpo_core.benchmark.cards import CARDS, Card, busy, find_card, waiting
from dgpo_core.benchmark.count import Phase
from dgpo_core.benchmark.iteration import count_without_weights
from dgpo_core.benchmark.models import policy_without_weights
from dgpo_core.common.errors import UserError
from dgpo_core.common.packages import is_installed
from dgpo_core.policy.vae import images_at_once
from dgpo_core.runs.assemble import set_up
from dgpo_core.settings.config import AUTO, Config, Kept
from dgpo_core.settings.resuming import left_open

REWARDS = 6 * GIB
"""What stays free for rewards where nothing has to leave the card."""
ROOMY = 2
"""Times the images that keep a card busy by its table: its arithmetic is reached by larger batches only."""
MOST = 64
"""Images at once: more gain nothing on any card."""
STAND_IN = CARDS["RTX 4090"]
"""For a card that is not in the table: a quick one, which wants larger batches."""
KINDS: tuple[Kept, ...] = ("none", "int8", "nf4")
"""How the base may be kept, the nearest to the whole one first."""

Probe = Callable[[Config], tuple[Counted, tuple[int, int]]]
"""The count of an iteration, and the image size in pixels."""


@dataclass(frozen=True)
class Choice:
    """The settings with nothing left open. needs, room: bytes at the peak, and all there are. said: in a line.
    seconds: of an iteration on the card, without the rewards'; 0 where it was not counted."""

    config: Config
    needs: float
    room: float
    said: str
    seconds: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether there is a choice that does."""
        return self.needs <= self.room


@dataclass(frozen=True)
class _Way:
    """One way to keep the base and to go back through it, with batches that fit; seconds: of an iteration."""

    config: Config
    needs: float
    seconds: float
    extra: float  # bytes of text encoders and VAE, which can stay where there is room


def smallest(config: Config) -> Config:
    """One group of two images, one at a time: every kind of forward is in it, and all else is a multiple of it."""
    return replace(
        config,
        data=replace(config.data, groups_per_iteration=1),
        rollout=replace(config.rollout, group_size=2, batch=1),
        training=replace(config.training, micro_batch=1),
        evaluation=replace(config.evaluation, images=1, batch=1),
    )


def probe(room: float, random: str = "") -> Probe:
    """Counts without weights, as on a device that has `room` bytes. random: as for `policy_without_weights`."""

    def count(config: Config) -> tuple[Counted, tuple[int, int]]:
        policy, _ = policy_without_weights(config, random)
        size = set_up(policy, config)
        return count_without_weights(policy, config, size, room=room), size

    return count


def choose_for(config: Config, free: float, card: str) -> Choice:
    """As `choose`, for a card of this name that has so many bytes free; where the model cannot be counted, the choice
    is what "auto" is without a count, and it says why."""
    room, start = free - GAPS, time.monotonic()
    try:
        known = find_card(card)
    except UserError:
        known = STAND_IN
    try:
        choice = choose(config, room, probe(room), known)
    except UserError as error:
        names = ", ".join(left_open(config))
        return Choice(config, 0, room, f"{names}: as by default, because this model cannot be counted. {error}")
    if not choice.fits:
        raise UserError(choice.said)
    return replace(choice, said=f"{choice.said} (Counted in {time.monotonic() - start:.0f} s.)")


def choose(config: Config, room: float, count: Probe, card: Card = STAND_IN) -> Choice:
    """The quickest settings that fit into `room` bytes, of those that are left open; what is fixed stays as it is.

    Where nothing fits, the smallest, with what is missing in `said`.
    """
    kinds = KINDS if config.model.quantize == AUTO else (config.model.kept_as,)
    found: list[_Way] = []
    for kind in (kind for kind in kinds if kind != "nf4" or kind in kinds[:1] or _has_nf4()):
        found = []
        for tried in _ways(config, kind):
            found.append(_way(tried, room, count, card))
            if found[-1].needs > room:
                break  # the next takes more
        fitting = [way for way in found if way.needs <= room]
        if fitting:
            best = min(fitting, key=lambda way: way.seconds)
            return _choice(config, best, room)
    least = min(found, key=lambda way: way.needs)
    return _choice(config, least, room)


def _has_nf4() -> bool:
    return is_installed("bitsandbytes")


def _ways(config: Config, kind: Kept) -> Iterator[Config]:
    """What is left open in how a base kept so is gone back through, that which takes least memory first."""
    memory = replace(config.memory, offload=config.memory.move)
    again = config.memory.gradient_checkpointing
    for recompute in (True, False) if again == AUTO else (again,):
        how = replace(memory, gradient_checkpointing=recompute)
        yield replace(config, model=replace(config.model, quantize=kind), memory=how)


def _way(config: Config, room: float, count: Probe, card: Card) -> _Way:
    """The settings with batches that fit, from a count of one image at a time."""
    counted, size = count(smallest(config))
    short = SHORT[config.memory.recompute]
    together = images_at_once(size)
    samples = config.rollout.group_size * config.data.groups_per_iteration
    update, draw, decode = counted["update"], counted["draw"], counted["decode"]

    at_once, drawn, group = config.training.at_once, config.rollout.at_once, config.rollout.group_size
    if config.training.micro_batch == AUTO:
        fits = _rows(update, room / short)
        enough = max(ROOMY * _enough(update, card), group)  # a group that is not cut needs a forward less
        at_once = _even(group, min(fits, enough, MOST))
    if config.rollout.batch == AUTO:
        fits = min(_rows(draw, room / SHORT[True]), _decoded(decode, room / SHORT[True], together))
        drawn = _even(samples, min(fits, ROOMY * _enough(draw, card), MOST))
    looked = (drawn or samples) if config.evaluation.batch == AUTO else config.evaluation.at_once
    looking = evaluated_at_once(replace(config, evaluation=replace(config.evaluation, batch=looked)))
    needs = max(
        counted["encode"].bytes * SHORT[True],
        _bytes(update, at_once) * short,
        *(_bytes(draw, batch) * SHORT[True] for batch in (drawn or samples, looking)),
        _bytes(decode, min(max(drawn or samples, looking), together)) * SHORT[True],
    )
    config = replace(
        config,
        rollout=replace(config.rollout, batch=drawn),
        training=replace(config.training, micro_batch=at_once),
        evaluation=replace(config.evaluation, batch=looked),
    )
    parts = (draw, drawn or samples), (decode, together), (update, at_once)
    seconds = sum(_seconds(phase, card, samples, rows) for phase, rows in parts)
    extra = counted["encode"].peak.get("text encoders", 0) + decode.peak.get("VAE", 0)
    return _Way(config, needs, seconds, extra)


def _rows(phase: Phase, room: float) -> int:
    """How many images fit, as one takes so many activations; at least one."""
    each = phase.peak.get("activations", 0)
    return max(1, int((room - phase.bytes + each) // each)) if each else MOST


def _decoded(phase: Phase, room: float, together: int) -> int:
    """How many images may be drawn so that as many of them as are decoded together fit."""
    fits = _rows(phase, room)
    return MOST if fits >= together else fits


def _bytes(phase: Phase, rows: int) -> float:
    return phase.bytes + (rows - 1) * phase.peak.get("activations", 0)


def _seconds(phase: Phase, card: Card, samples: int, rows: int) -> float:
    """Of a phase that was counted for two images, one at a time, for `samples` of them, `rows` at a time."""
    return samples / 2 * max(busy(phase.kernels, card), waiting(phase.kernels, card) / rows)


def _enough(phase: Phase, card: Card) -> int:
    """Images at once that keep the card as busy as it can be, however long it waits for kernels and for weights."""
    return max(1, math.ceil(waiting(phase.kernels, card) / max(busy(phase.kernels, card), 1e-9)))


def _even(samples: int, most: int) -> int:
    """A batch of at most `most` that cuts the samples into equal parts, as far as can be."""
    most = min(most, samples)
    return math.ceil(samples / math.ceil(samples / most))


def _choice(asked: Config, way: _Way, room: float) -> Choice:
    config = way.config
    if asked.memory.offload == AUTO and way.needs + way.extra + REWARDS <= room:
        config = replace(config, memory=replace(config.memory, offload=False))
        way = replace(way, needs=way.needs + way.extra)
    took = f"{way.needs / GIB:.1f} of {room / GIB:.1f} GiB"
    values = ", ".join(f"{name} {_shown(value)}" for name, value in _values(config, left_open(asked)).items())
    if way.needs <= room:
        said = f"Needs about {took}" + (f"; chosen: {values}." if values else ".")
        return Choice(config, way.needs, room, said, way.seconds)
    missing = (way.needs - room) / GIB
    return Choice(
        config,
        way.needs,
        room,
        f"It does not fit even at its smallest{f' ({values})' if values else ''}: {missing:.1f} GiB are missing, it"
        f" needs about {took}; {others_that_take_less(config)}.",
        way.seconds,
    )


def others_that_take_less(config: Config) -> str:
    """What else takes less, of what is not chosen by itself."""
    said = []
    if config.model.kept_as in ("none", "fp8", "int8"):
        kinds = "int8 or nf4" if config.model.kept_as == "none" else "nf4"
        said.append(f"set model.quantize to {kinds}" + ("" if _has_nf4() else " (with the package bitsandbytes)"))
    if not config.memory.offload_blocks:
        said.append("turn on memory.offload_blocks")
    said.append("lower model.height and model.width")
    return " or ".join(said)


def _values(config: Config, names: list[str]) -> Mapping[str, object]:
    return {name: getattr(getattr(config, name.partition(".")[0]), name.partition(".")[2]) for name in names}


def _shown(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
