"""Groups scored by several rewards: what can go wrong is told with the reward and the sample."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dgpo_core.common import patience
from dgpo_core.common.errors import Exhausted, UserError
from dgpo_core.common.group import Group
from dgpo_core.rewards.base import GroupReward, Reward
from dgpo_core.rewards.guard import described, guarded, overlap


def score_groups(groups: Sequence[Group], rewards: Mapping[str, Reward]) -> list[Group]:
    """The groups with every reward's scores.

    Raises UserError, naming the reward and the sample, for a wrong shape, a score that is not a finite number, and
    whatever exception a reward raises.
    """
    if not groups:
        return []
    images = torch.cat([group.images for group in groups])
    prompts = [group.prompt.text for group in groups for _ in range(len(group))]
    metadata = [group.prompt.metadata for group in groups for _ in range(len(group))]
    sources = [pictures for group in groups for pictures in [group.sources] * len(group)]
    scores = {
        name: _scores_of_groups(name, reward, groups, prompts)
        if isinstance(reward, GroupReward)
        else scores_of(name, reward, images, prompts, metadata, sources)
        for name, reward in rewards.items()
    }
    parts = {name: values.split([len(group) for group in groups]) for name, values in scores.items()}
    return [group.scored({name: parts[name][i] for name in parts}) for i, group in enumerate(groups)]


def _scores_of_groups(name: str, reward: GroupReward, groups: Sequence[Group], prompts: Sequence[str]) -> Tensor:
    with guarded(f"Reward {name!r} failed with"):
        values = reward.score_groups(groups)
    return checked(name, values, prompts)


def scores_of(
    name: str,
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    sources: Sequence[Sequence[Tensor]] = (),
) -> Tensor:
    """The scores of one reward, checked, float32 [B] on the CPU; raises UserError as `score_groups` does.

    sources: as in `Reward.score_edits`; none given: no image has any.
    """
    sources = sources or [()] * len(prompts)
    try:
        values = reward.score_edits(images, prompts, metadata, sources)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        where = _failing(reward, images, prompts, metadata, sources)
        raise UserError(f"Reward {name!r} failed on {where} with {described(error)}.") from error
    return checked(name, values, prompts)


def _failing(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    sources: Sequence[Sequence[Tensor]],
) -> str:
    """The first sample on which the reward fails alone as well; all of them where there is none."""
    for i in range(len(prompts)):
        one = slice(i, i + 1)
        try:
            reward.score_edits(images[one], prompts[one], metadata[one], sources[one])
        except (Exception, SystemExit):
            return f"sample {i} ({prompts[i]!r})"
    return f"samples 0 to {len(prompts) - 1} ({prompts[0]!r}, ...)"


def checked(name: str, values: Tensor, prompts: Sequence[str]) -> Tensor:
    """What the reward `name` returned, float32 [B] on the CPU; raises UserError as `score_groups` does."""
    if not isinstance(values, Tensor):
        raise UserError(f"Reward {name!r} returned {type(values).__name__}: it must return a tensor of scores.")
    if values.shape != (len(prompts),):
        raise UserError(
            f"Reward {name!r} returned scores of shape {tuple(values.shape)} for {len(prompts)} images: it must return"
            " one number per image."
        )
    if values.is_complex():
        raise UserError(f"Reward {name!r} returned complex numbers: it must return one real number per image.")
    with guarded(f"Reward {name!r} returned scores that cannot be read:"):
        values = values.detach().float().cpu()
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise UserError(f"Reward {name!r} returned {values[i]} for sample {i} ({prompts[i]!r}): it must be a number.")
    return values


class Scoring:
    """Scores the groups of an iteration, as far as its rewards `overlap` while the next groups are drawn.

    Use it as a context manager around drawing and scoring: `start` a group as soon as it is drawn, and at last take the
    `results` of all. The scores are the same as without overlapping, as such rewards are always given one group.
    device: what the policy draws on. one_by_one: score every group alone, so that a bad one does not spoil the others.
    """

    def __init__(
        self, rewards: Mapping[str, Reward], device: torch.device, group_size: int, one_by_one: bool = False
    ) -> None:
        self.beside = {name: reward for name, reward in rewards.items() if overlap(name, reward, device, group_size)}
        self.after = {name: reward for name, reward in rewards.items() if name not in self.beside}
        self.order, self.one_by_one = list(rewards), one_by_one
        self._worker: ThreadPoolExecutor | None = None
        self._over = threading.Event()
        self._jobs: dict[Group, Future[Group]] = {}

    def __enter__(self) -> "Scoring":
        self._worker = ThreadPoolExecutor(1) if self.beside else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()  # whoever still waits for a server need not
        if self._worker:
            self._worker.shutdown(wait=False, cancel_futures=True)

    def start(self, group: Group) -> None:
        """Scores `group` in the background, by the rewards that overlap."""
        if self._worker:
            self._jobs[group] = self._worker.submit(self._beside, group)

    def _beside(self, group: Group) -> Group:
        with patience.until(self._over):
            return score_groups([group], self.beside)[0]

    def results(self, groups: Sequence[Group]) -> list[Group | UserError]:
        """For each group its scored self; where groups are scored one by one, what was wrong with it instead.

        Raises UserError as `score_groups` does.
        """
        for group in groups:
            if group not in self._jobs:
                self.start(group)
        batches = [[group] for group in groups] if self.one_by_one else [groups]
        return [outcome for batch in batches for outcome in self._scored(batch)]

    def _scored(self, groups: Sequence[Group]) -> list[Group | UserError]:
        try:
            beside = [patience.result(self._jobs[group]) if self.beside else group for group in groups]
            after = score_groups(groups, self.after)
        except UserError as error:
            if not self.one_by_one or isinstance(error, Exhausted):
                raise
            return [error]
        found = [{**a.scores, **b.scores} for a, b in zip(beside, after, strict=True)]
        return [g.scored({n: scores[n] for n in self.order}) for g, scores in zip(groups, found, strict=True)]
