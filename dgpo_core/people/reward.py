"""The reward `human`: you say, on a page of your own browser, which images are better."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgpo_core.common.group import Group
from dgpo_core.people.apprentice import Apprentice
from dgpo_core.people.ask import ask
from dgpo_core.people.questions import OPENED, Questions
from dgpo_core.people.server import HOST, AskingServer
from dgpo_core.rewards.base import GroupReward
from dgpo_core.rewards.taste.features import features
from dgpo_core.settings.config import HumanConfig


class Human(GroupReward):
    """Waits for an answer about all groups of an iteration; the first question opens the page and tells its address.

    folder: where the images and the answers are kept. check: called some times a second; what it raises ends the wait.
    """

    def __init__(
        self,
        folder: Path,
        settings: HumanConfig,
        check: Callable[[], None],
        tell: Callable[[str], None],
        device: str = "cpu",
    ) -> None:
        super().__init__(device)
        self.folder, self.settings, self.interrupted, self.tell = folder, settings, check, tell
        self.questions = Questions(self._open)
        self.server: AskingServer | None = None
        self.apprentice = apprentice_of(folder, settings, tell, device) if settings.taste else None

    def score_groups(self, groups: Sequence[Group]) -> Tensor:
        """What you said, [B]; where you said nothing, or not in time, all images of a group are equal."""
        keys, sizes, s = [_key(group) for group in groups], [len(group) for group in groups], self.settings
        answer = ask(
            self.questions,
            groups,
            keys,
            self.folder,
            {},
            mode=s.mode,
            pairs=s.pairs,
            timeout_s=s.timeout,
            check=self.interrupted,
            skip=True,
            apprentice=self.apprentice,
        )
        if answer is None:  # not where skipping counts as an answer
            raise ValueError("nobody answered")
        return torch.tensor([score for row in answer.rows(sizes) for score in row])

    def _open(self, event: str, data: Mapping[str, Any]) -> None:
        """At the first question. Raises UserError where the port is taken."""
        if event == OPENED and self.server is None:
            self.server = AskingServer(self.questions, self.folder, self.settings.port)
            port = self.server.server_address[1]
            self.tell(f"Open {self.server.url} (from another machine, first: ssh -L {port}:{HOST}:{port} THIS_MACHINE)")

    def close(self) -> None:
        if self.server:
            self.server.close()


def apprentice_of(
    folder: Path, settings: HumanConfig, tell: Callable[[str], None], device: torch.device | str
) -> Apprentice:
    """A taste that learns from the answers in a folder. Raises UserError where CLIP is there and cannot be read."""
    return Apprentice(folder, features(), settings.answers, settings.audit, tell, device)


def _key(group: Group) -> str:
    """Names the group by what it is drawn from: the seeds hold the run's seed, the iteration and the place in it."""
    parts = [group.prompt.text, *map(str, group.seeds)]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
