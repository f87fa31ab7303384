"""What a training needs of the card, how long a round takes there and when it is done: told before the first forward.

Counted as `python -m dgpo_core.fit` counts, once for a policy and its settings. Told on a CUDA card alone: on a CPU
nobody asks whether it fits, and no table says how quick it is; there the first rounds show it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from dgpo_core.benchmark.advice import GIB, RESERVE, Counted
from dgpo_core.benchmark.cards import Card, find_card
from dgpo_core.benchmark.count import Phase
from dgpo_core.common.errors import UserError
from dgpo_core.method.update import References
from dgpo_core.settings.config import Config

from ..common import host
from ..common.bounded import Bounded
from ..common.values import PolicySpec, Prompts, Sampler, Training, key_of
from ..on_model.counting import Counted as OfNetwork
from ..on_model.policy import NativePolicy
from . import sessions

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forecast:
    """needs: bytes at the peak. seconds: of a round, without its rewards; 0 where no table has the card. config: the
    settings with what they leave open chosen. missing: what is to be said where it does not fit."""

    needs: float
    seconds: float
    config: Config
    missing: str = ""

    def sentence(self, whole: float, rounds: int, now: float) -> str:
        """ "needs about 9.8 of 12 GB, 40 s an iteration, done at 21:40".

        whole: bytes of the card. rounds: those that are left; of 0 no end is told. now: as `time.time` gives it.
        """
        told = f"needs about {self.needs / GIB:.1f} of {whole / GIB:.0f} GB"
        if self.seconds:
            told += (
                f", {self.seconds:.0f} s an iteration" if self.seconds >= 10 else f", {self.seconds:.1f} s an iteration"
            )
        if self.seconds and rounds:
            end = time.localtime(now + rounds * self.seconds)
            told += time.strftime(", done at %H:%M" + (" on %d %B" if rounds * self.seconds > 20 * 3600 else ""), end)
        return f"{told}. {self.missing}".rstrip(" .") if self.missing else told


_known: Bounded[Forecast] = Bounded(16)
"""By all that a forecast depends on; touched in ComfyUI's worker thread alone, as `held`."""


def tell(spec: PolicySpec, prompts: Prompts, sampler: Sampler, training: Training, rounds: int) -> str:
    """The sentence, in the console and for the node; empty where there is no card or no count.

    What the settings leave open is from now on as it was chosen. rounds: those that are left, 0 for a single step.
    """
    card = host.card()
    if card is None:
        return ""
    name, whole = card
    config = sessions.config_of(spec, sampler, training.training)
    config = replace(config, data=replace(config.data, groups_per_iteration=prompts.per_iteration))
    key = key_of(replace(config, name="", seed=0), spec.source, name, whole)
    try:
        found = _known.take(key, lambda: _count(spec, prompts, config, name, whole))
    except UserError as error:
        _log.info("DGPO: what this training needs cannot be counted. %s", error)
        return ""
    sessions.choose(spec, found.config)
    said = found.sentence(whole, rounds, time.time())
    _log.warning("DGPO: %s", said)
    return said


def _count(spec: PolicySpec, prompts: Prompts, config: Config, name: str, whole: float) -> Forecast:
    try:
        card: Card | None = find_card(name)
    except UserError:
        card = None
    if spec.source != "native":
        path = host.model_path(spec.model.path)
        return of_files(replace(config, model=replace(config.model, path=path)), whole, card)
    policy = sessions.policy_of(spec)
    size = config.model.height, config.model.width

    def network(recompute: bool) -> OfNetwork:
        with host.engine():
            native = isinstance(policy, NativePolicy)
            found = policy.counts.of_prompt(prompts.prompts[0], *size, recompute) if native else None
        if found is None:
            raise UserError("The MODEL's network cannot be built a second time.")
        return found

    return of_network(config, network, whole, card)


def of_files(config: Config, whole: float, card: Card | None) -> Forecast:
    """For a model of diffusers', its file or folder in `config.model.path`, on a card of so many bytes.

    Raises UserError where it cannot be counted.
    """
    from dgpo_core.benchmark.choose import probe  # imported late: it takes seconds

    return _of(config, probe(whole - RESERVE), whole, card)


def of_network(config: Config, counted: Callable[[bool], OfNetwork], whole: float, card: Card | None) -> Forecast:
    """For a MODEL's network, without the VAE, for which ComfyUI makes room as it always does.

    counted: whether activations are recomputed -> what it takes then.
    """
    return _of(config, lambda tried: (phases(tried, counted(tried.memory.recompute)), (1024, 1024)), whole, card)


def _of(
    config: Config, count: Callable[[Config], tuple[Counted, tuple[int, int]]], whole: float, card: Card | None
) -> Forecast:
    from dgpo_core.benchmark.choose import STAND_IN, choose

    found = choose(config, whole - RESERVE, count, card or STAND_IN)
    return Forecast(found.needs, found.seconds if card else 0.0, found.config, "" if found.fits else found.said)


def phases(config: Config, counted: OfNetwork) -> Counted:
    """What `choose` asks for, two images one at a time: a round's forwards and backwards, each as it was counted."""
    t, references = config.training, References.of(config.training)
    # 1: the error of a group that is cut
    forwards = 1 + sum(reference.forwards for reference in references.asked(t.clip))
    branches = 2 if config.rollout.cfg > 1 else 1

    def phase(activations: int, *parts: tuple[Phase, int]) -> Phase:
        found = Phase(peak={"base": counted.base, "adapters": counted.adapters, "activations": activations})
        for part, times in parts:
            found.kernels.update({kernel: number * times for kernel, number in part.kernels.items()})
        return found

    forward, update = counted.forward, counted.update
    return {
        "encode": phase(0),
        "draw": phase(branches * forward.peak["activations"], (forward, 2 * branches * config.rollout.steps)),
        "decode": phase(0),
        "update": phase(update.peak["activations"], (forward, 2 * t.timesteps * forwards), (update, 2 * t.timesteps)),
    }
