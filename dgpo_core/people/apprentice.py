"""A taste that learns from a person while it answers beside them: who is asked about which group.

The groups of an iteration are looked at together, by a taste fitted to all that the person has said before. It answers
a group where it is sure, and the person is asked

- about every group while the taste is not above chance on held-out answers (`Agreement.above_chance`), and where it
  orders no more than half of the pairs right in the last `RECENT` groups, which it predicts before it learns them;
- about each group of which its doubt (`Taste.doubt`) is above `SURE`;
- about some of the others all the same: a share that is the error of those recent predictions, but at least `audit`. So
  it asks more often when the agreement falls;
- about nothing any more once the person was asked about the number of groups that was agreed on.

Everything follows from the preference file and its pictures, so a run that goes on decides as if it had not stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.pictures import to_pil
from dgpo_core.common.seeds import derive_seed
from dgpo_core.people.gallery import RatedGroup
from dgpo_core.people.judged import judged, picture_key
from dgpo_core.people.preference_file import AnswerFile, Preference
from dgpo_core.people.preferences import SKIP, scores_from, told_apart
from dgpo_core.rewards.taste.features import Features
from dgpo_core.rewards.taste.model import CHANCE, Judged, Taste, agreed, fit

SURE = 0.15
"""The doubt up to which a taste answers a group, of 0.5 for no idea at all."""
RECENT = 4
"""Groups whose predictions tell whether the taste is still right; while there are fewer, cross-validation tells."""
TIED = 0.5
"""Logits by which two pictures differ at least to be told apart: the better one then wins 62 % of the time."""
ANSWERS = "answers.jsonl"
"""The answers, in the folder that they are asked in."""
FILE = "taste.safetensors"
"""The taste that was made of them, beside them."""


@dataclass(frozen=True)
class Plan:
    """What becomes of groups. said: the taste's answers by the group's number; ask: the numbers of the others."""

    said: Mapping[int, Mapping[str, Any]]
    ask: Sequence[int]


@dataclass
class Apprentice:
    """Learns from the answers in a folder (`AnswerFile`), and keeps its taste beside them.

    seen: the features. most: groups that the person is asked about, 0 for no end.
    audit: see above. tell: what is told when it begins to answer, is found wrong, or goes on alone. device: where the
    features are computed.
    """

    folder: Path
    seen: Features
    most: int
    audit: float
    tell: Callable[[str], None] = print
    device: torch.device | str = "cpu"
    taste: Taste | None = None
    _looked: dict[str, tuple[Tensor, tuple[str, ...]]] = field(default_factory=dict)
    _learned: dict[str, Judged] = field(default_factory=dict)
    _of: tuple[str, ...] = ()
    _state: str = ""

    def plan(self, groups: Sequence[Group], keys: Sequence[str]) -> Plan:
        """Who answers each of the groups, which nobody has answered yet. keys: theirs.

        Raises UserError where no more may be asked and there is no taste that could go on alone.
        """
        before = [said for said in self._said() if said.key not in set(keys)]
        left = self._left(before)
        with self.seen.on(self.device):
            self._learn(before)
            x = [self._features(group) for group in groups]
        known = [tuple(picture_key(to_pil(image)) for image in group.images) for group in groups]
        self._looked = dict(zip(keys, zip(x, known, strict=True), strict=True))
        trusted = self._trusted(before)
        if not trusted:
            if left == 0:
                raise UserError(
                    f"You have answered the {self.most} groups of human.answers, and the taste made of them is no"
                    " better than chance: raise human.answers (0: no end) and resume."
                )
            asked = list(range(len(groups)))
        else:
            assert self.taste  # it is trusted
            doubts = [self.taste.doubt(one) for one in x]
            often = max(self.audit, 1 - fmean(recent) if (recent := _recent(before)) else 0.0)
            audited = [derive_seed("audit", key) / 2**63 < often for key in keys]
            asked = [i for i, doubt in enumerate(doubts) if doubt > SURE or audited[i]]
            asked.sort(key=lambda i: -doubts[i])
        if left is not None:
            asked = asked[:left]
        self._report(before, left == 0)
        ask = sorted(asked)
        return Plan({i: self._answer(one) if trusted else SKIP for i, one in enumerate(x) if i not in ask}, ask)

    @property
    def given(self) -> int:
        """Answers that the person has given so far: a group is one, or each of its pairs."""
        return sum(map(_answers, self._said()))

    def agreed(self, key: str, answer: Mapping[str, Any]) -> float | None:
        """Of a group that was planned just now: what share of the pairs that the person told apart the taste had
        ordered alike; None for none."""
        x, pictures = self._looked[key]
        self._learned[key] = judgement = Judged(x, tuple(told_apart(answer, len(x))), pictures)
        if self.taste is None or not judgement.told_apart:
            return None
        return agreed(self.taste.scores(x), judgement)

    def _said(self) -> list[Preference]:
        """What the person said, the last of each question, in order."""
        found: dict[str, Preference] = {}
        for said in AnswerFile(self.folder / ANSWERS).all():
            if not said.by:
                found.pop(said.key, None)
                found[said.key] = said
        return list(found.values())

    def _left(self, before: Sequence[Preference]) -> int | None:
        """Groups that may still be asked about; None for no end."""
        return max(0, self.most - len(before)) if self.most else None

    def _learn(self, before: Sequence[Preference]) -> None:
        """The taste of these answers, fitted anew where they are not those that it was fitted to."""
        told = [said for said in before if told_apart(said.answer, len(said.images))]
        if tuple(said.key for said in told) == self._of:
            return
        for said in told:
            if said.key not in self._learned:
                (self._learned[said.key],) = judged([self._rated(said)], self.seen)
        self._of = tuple(said.key for said in told)
        usable = [self._learned[key] for key in self._of]
        self.taste = fit(usable, self.seen) if any(one.told_apart for one in usable) else None
        if self.taste:
            self.taste.save(self.folder / FILE)

    def _rated(self, said: Preference) -> RatedGroup:
        size = len(said.images)
        scores = tuple(scores_from(said.answer, size) or [0.0] * size)
        files = tuple(self.folder / name for name in said.images)
        return RatedGroup(said.prompt, files, scores, told=tuple(told_apart(said.answer, size)))

    def _trusted(self, before: Sequence[Preference]) -> bool:
        """Whether the taste may answer. What it got wrong lately makes no end of it once nobody is asked any more."""
        recent = _recent(before)
        if self.taste is None or not self.taste.agreement.above_chance:
            return False
        return self._left(before) == 0 or len(recent) < RECENT or fmean(recent) > CHANCE

    def _features(self, group: Group) -> Tensor:
        """Of the pictures as their files have them, float32 [G, D]."""
        return self.seen.of([to_pil(image) for image in group.images], [group.prompt.text] * len(group))

    def _answer(self, x: Tensor) -> Mapping[str, Any]:
        """A ranking, in which what the taste can hardly tell apart is tied."""
        assert self.taste
        scores, ranks = self.taste.scores(x).tolist(), list[list[int]]()
        for i in sorted(range(len(scores)), key=scores.__getitem__, reverse=True):
            if ranks and scores[ranks[-1][0]] - scores[i] < TIED:
                ranks[-1].append(i)
            else:
                ranks.append([i])
        return {"ranking": [sorted(rank) for rank in ranks]} if len(ranks) > 1 else SKIP

    def _report(self, before: Sequence[Preference], alone: bool) -> None:
        """Tells once when something about who answers has changed."""
        state = "asks" if not self._trusted(before) else "alone" if alone else "answers"
        if state != self._state and self.taste and (self._state or state != "asks"):
            said = {
                "asks": "The taste is no better than chance any more on what you said last: you are asked about all.",
                "answers": f"The taste answers what it is sure of; it agrees with you on {self.taste.agreement}.",
                "alone": f"You have answered your {self.most} groups; the taste goes on alone: {self.folder / FILE}.",
            }[state]
            self.tell(said)
        self._state = state


def _recent(before: Sequence[Preference]) -> list[float]:
    """Of the last groups that the taste predicted, the shares that it got right."""
    return [said.agreed for said in before if said.agreed is not None][-RECENT:]


def _answers(said: Preference) -> int:
    """How many answers it took."""
    return len(said.answer["pairs"]) if "pairs" in said.answer else 1
