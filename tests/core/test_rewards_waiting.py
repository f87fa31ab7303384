"""Nobody waits for a server longer than for the user: Ctrl-C and Cancel end it, in whatever thread it is asked."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from bad_server import silent, talking
from engine import SIZE, quick

from dgpo_core.common import patience
from dgpo_core.common.errors import Interrupted
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.rewards import Reward, Scoring, make_reward, score_groups

pytestmark = pytest.mark.slow

Score = Callable[[Sequence[Group], Mapping[str, Reward]], Any]
SOON = 5.0  # seconds: two looks, on a busy machine; the server itself never answers
OPTIONS = {
    "remote": {"timeout": 60.0, "batch": 1},
    "vlm_judge": {"timeout": 60.0, "model": "m", "concurrency": 2},
}


class Cancelled(Exception):
    """As ComfyUI's, which an `except Exception` would take for a failure of the reward."""


def after(seconds: float, error: BaseException) -> Callable[[], None]:
    """Raises the error from so many seconds on."""
    end = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > end:
            raise error

    return check


def beside_drawing(groups: Sequence[Group], rewards: Mapping[str, Reward]) -> None:
    with Scoring(rewards, torch.device("cpu"), 4) as scoring:
        scoring.results(groups)


def nobody_waits() -> bool:
    """Whether every thread that asks a server ends, now or soon."""
    end = time.monotonic() + SOON
    names = ("dgpo-request", "ThreadPoolExecutor")
    while any(thread.name.startswith(names) for thread in threading.enumerate()):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("error", [Interrupted(), Cancelled()], ids=["Ctrl-C", "Cancel"])
@pytest.mark.parametrize("scoring", [beside_drawing, score_groups], ids=["beside drawing", "afterwards"])
@pytest.mark.parametrize("name", OPTIONS)
def test_asking_ends_at_once_and_leaves_no_thread(
    policy: DiffusersPolicy, name: str, scoring: Score, error: BaseException
) -> None:
    with talking(silent) as url:
        reward = {name: make_reward(name, {"url": url, **OPTIONS[name]})}
        trainer = Trainer(policy, [Prompt("red")], reward, quick(), size=SIZE)
        groups = trainer.step.draw([(0, Prompt("red"))])
        start = time.monotonic()
        with pytest.raises(type(error)), patience.asking(after(0.3, error)):
            scoring(groups, reward)
        assert time.monotonic() - start < SOON
        assert nobody_waits()


def test_a_pause_between_two_tries_ends_too() -> None:
    reward = make_reward("remote", {"url": "http://127.0.0.1:9", "backoff": 60.0, "retries": 3})
    start = time.monotonic()
    with pytest.raises(Interrupted), patience.asking(after(0.3, Interrupted())):
        reward.score(torch.rand(1, 3, 4, 4), ["red"], [{}])
    assert time.monotonic() - start < SOON
