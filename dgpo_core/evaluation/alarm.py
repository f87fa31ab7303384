"""Is the reward being hacked? One rule over the evaluations of a run so far, and nothing else.

In-domain is the reward that is trained, on held-out prompts. Two evaluations are compared image by image (same prompt,
same seed), and a difference counts where it is larger than its noise: `SURE` standard errors. The in-domain reward is
*up* where it is higher than at the first evaluation by more than noise. While it is up,

- a watched **reward** has *fallen* where it is lower (higher, if lower is better) than at its best evaluation by more
  than noise, and in-domain has not fallen since then (where both fall, the training fails, and nothing is hacked);
- a watched **statistic**, which is neither good nor bad in itself, has *left the base's range* where it differs from
  the first evaluation by more than noise and is less than half or more than double of it. Entropy is a logarithm: a bit
  less is half as many levels of brightness. The diversity within a group may fall to a quarter: on the embedded model
  an honest reward halves it, as wrong pictures become rare, and a collapse to one picture leaves a tenth.

The alarm goes off where that holds at each of the last `LOOKS` evaluations. More than one look, and three standard
errors rather than two, pay for looking often and at several numbers, and for comparing with the best of many.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dgpo_core.evaluation.scores import Evaluation
from dgpo_core.rewards import weights_of
from dgpo_core.settings.config import NEUTRAL, RewardTerm

SURE = 3.0
LOOKS = 2
FACTOR, DIVERSITY_FACTOR = 2.0, 4.0


@dataclass(frozen=True)
class Alarm:
    """What was seen: the watched `name` went from `before` to `after` since `since`, in-domain likewise."""

    name: str
    since: int
    iteration: int
    before: float
    after: float
    in_domain: tuple[float, float]

    def __str__(self) -> str:
        verb = "fell" if self.after < self.before else "rose"
        low, high = self.in_domain
        return (
            f"the reward may be hacked: since iteration {self.since} the reward that is trained rose from {low:.3g} to"
            f" {high:.3g} on held-out prompts, while {self.name}, which is only watched, {verb} from {self.before:.3g}"
            f" to {self.after:.3g}"
        )


def alarms(evaluations: Sequence[Evaluation], in_domain: Mapping[str, float], watched: Collection[str]) -> list[Alarm]:
    """What has gone off so far, each watched name once, when it first did.

    evaluations: in order, the first one of the base. in_domain: weights of the rewards that are trained.
    """
    seen = looks(evaluations, in_domain, watched)
    found: dict[str, Alarm] = {}
    for i in range(LOOKS - 1, len(seen)):
        for name, since in seen[i].items():
            if name not in found and all(name in seen[j] for j in range(i - LOOKS + 1, i)):
                found[name] = _alarm(since, evaluations[i], in_domain, name)
    return list(found.values())


def best(evaluations: Sequence[Evaluation], in_domain: Mapping[str, float], watched: Collection[str]) -> Evaluation:
    """The highest in-domain reward among the evaluations at which nothing that is watched had fallen or left its range.

    One look decides, by what came before it, so that the answer is known at once and can be kept. The base counts.
    """
    chosen = evaluations[0]
    for now, spoilt in zip(evaluations, looks(evaluations, in_domain, watched), strict=True):
        if not spoilt and now.gain(chosen, in_domain).mean > 0:
            chosen = now
    return chosen


def looks(
    evaluations: Sequence[Evaluation], in_domain: Mapping[str, float], watched: Collection[str]
) -> list[dict[str, Evaluation]]:
    """For each evaluation, what the rule holds for at this one look, and the earlier evaluation that it went down from:
    the base for a statistic, the best so far for a reward."""
    found: list[dict[str, Evaluation]] = []
    better = {name: weights_of([RewardTerm(name)]) for name in watched}  # with these, more is better of each
    highest = dict.fromkeys(watched, (0.0, evaluations[0])) if evaluations else {}
    for now in evaluations:
        base, spoilt = evaluations[0], {}
        up = now.gain(base, in_domain)
        for name in watched:
            since = base if name in NEUTRAL else highest[name][1]
            rising = up.mean > SURE * up.sem and now.gain(since, in_domain).mean > 0
            if rising and _has_gone(since, now, better[name]):
                spoilt[name] = since
            highest[name] = max(highest[name], (now.gain(base, better[name]).mean, now), key=lambda pair: pair[0])
        found.append(spoilt)
    return found


def _has_gone(since: Evaluation, now: Evaluation, better: Mapping[str, float]) -> bool:
    """Whether a reward has fallen, or a statistic has left its range, by more than noise."""
    (name,), change = better, now.gain(since, better)
    if name not in NEUTRAL:
        return change.mean < -SURE * change.sem
    return abs(change.mean) > SURE * change.sem and _has_left(name, *_levels(since, now, name))


def _has_left(name: str, before: float, after: float) -> bool:
    if name == "entropy":
        before, after = 2.0**before, 2.0**after
    factor = DIVERSITY_FACTOR if name == "group_diversity" else FACTOR
    return after < before / factor or after > before * factor


def _levels(since: Evaluation, now: Evaluation, name: str) -> tuple[float, float]:
    """The mean then and now, both over the images of now's evaluation as far as they are known."""
    after = now.scores[name].mean().item()
    return after - now.gain(since, {name: 1.0}).mean, after


def _alarm(since: Evaluation, now: Evaluation, in_domain: Mapping[str, float], name: str) -> Alarm:
    before, after = _levels(since, now, name)
    high = now.total(in_domain).mean().item()
    low = high - now.gain(since, in_domain).mean
    return Alarm(name, since.iteration, now.iteration, before, after, (low, high))
