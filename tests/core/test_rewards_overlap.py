"""Scoring beside drawing: the same scores, and sooner where the reward waits for something else."""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from engine import SIZE, quick
from slow import Slow, SlowAfter
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.method.iteration import Iteration
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.rewards import Reward, Scoring, make_reward

pytestmark = pytest.mark.slow

PROMPTS = [Prompt(text) for text in ("red", "blue", "red blue", "blue red", "red red", "blue blue")]
FORWARD, IMAGE = 0.05, 0.05  # seconds: long against what the tiny model itself takes


def iterate(policy: DiffusersPolicy, reward: Reward, forward: float = 0.0, **changes: Any) -> tuple[Iteration, float]:
    """One iteration of 6 groups of 4, one group per batch and 3 forwards; and the seconds of drawing and scoring."""
    config = quick(data={"groups_per_iteration": 6}, rollout={"batch": 4}, **changes)
    trainer = Trainer(policy, PROMPTS, {"bright": reward}, config, size=SIZE, check=lambda: time.sleep(forward))
    done = trainer.iterate()
    return done, done.seconds["rollout"] + done.seconds["reward"]


def test_scores_and_order_are_the_same(policy: DiffusersPolicy) -> None:
    found = []
    for reward in (SlowAfter(seconds=0.001), Slow(seconds=0.001)):
        config = quick(data={"groups_per_iteration": 6}, rollout={"batch": 3})  # batches across groups
        trainer = Trainer(policy, PROMPTS, {"bright": reward}, config, size=SIZE)
        with Scoring({"bright": reward}, policy.device, 4) as scoring:
            groups = trainer.step.draw(list(enumerate(trainer.stream.at(0))), scoring.start)
            found.append(scoring.results(groups))
    for x, y in zip(*found, strict=True):
        assert x.prompt == y.prompt
        assert torch.equal(x.images, y.images)
        assert torch.equal(x.latents, y.latents)
        assert torch.equal(x.scores["bright"], y.scores["bright"])


def test_an_iteration_is_shorter_when_the_reward_waits_elsewhere(policy: DiffusersPolicy) -> None:
    _, after = iterate(policy, SlowAfter(seconds=IMAGE), FORWARD)
    _, beside = iterate(policy, Slow(seconds=IMAGE), FORWARD)
    drawing, scoring = 6 * 3 * FORWARD, 6 * 4 * IMAGE  # 0.9 and 1.2 s
    assert after >= drawing + scoring
    # scoring starts after the first group (0.15 s) and goes on without a break: 1.35 instead of 2.1 s, plus the model
    assert beside < 0.85 * after


def test_scoring_beside_drawing_is_never_twice_at_once_and_one_group_at_a_time(policy: DiffusersPolicy) -> None:
    seen: list[tuple[int, int]] = []
    lock = threading.Lock()

    class Spy(Slow):
        def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
            assert lock.acquire(blocking=False)
            seen.append((len(images), len(set(prompts))))
            scores = super().score(images, prompts, metadata)
            lock.release()
            return scores

    iterate(policy, Spy(seconds=0.01))
    assert seen == [(4, 1)] * 6


def test_what_fails_beside_drawing_is_told_as_otherwise(policy: DiffusersPolicy) -> None:
    class Failing(Slow):
        def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
            if "blue" in prompts:
                raise ValueError("no blue")
            return super().score(images, prompts, metadata)

    with pytest.raises(UserError, match=r"'bright' failed on sample 0 \('blue'\) with ValueError: no blue"):
        iterate(policy, Failing(seconds=0.0))
    done, _ = iterate(policy, Failing(seconds=0.0), on_bad_score="skip")
    assert done.metrics["skipped"] == 1
    assert "blue" not in [g.prompt.text for g in done.groups]


def test_a_group_is_scored_once_though_the_memory_ran_out_while_the_next_were_drawn(
    policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that takes money for every image is not paid twice."""
    paid: list[str] = []

    class Judge(Slow):
        def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
            paid.append(prompts[0])
            return super().score(images, prompts, metadata)

    real, decoded = policy.decode, []

    def decode(latents: Tensor) -> Tensor:
        decoded.append(len(latents))
        if len(decoded) in (3, 4):
            raise torch.OutOfMemoryError
        return real(latents)

    monkeypatch.setattr(policy, "decode", decode)
    config = quick(data={"groups_per_iteration": 6}, rollout={"batch": 4})
    told: list[str] = []
    trainer = Trainer(policy, PROMPTS, {"bright": Judge(seconds=0.0)}, config, size=SIZE, tell=told.append)
    done = trainer.iterate()
    assert len(told) == 2
    assert trainer.step.rollout_batch == 1
    assert sorted(paid) == sorted(prompt.text for prompt in PROMPTS)
    assert [group.prompt for group in done.groups] == trainer.stream.at(0)
    monkeypatch.setattr(policy, "decode", real)
    again = Trainer(policy, PROMPTS, {"bright": Slow(seconds=0.0)}, config, size=SIZE)
    for found, expected in zip(done.groups, again.step.draw(list(enumerate(again.stream.at(0)))), strict=True):
        assert found.seeds == expected.seeds


@pytest.mark.parametrize(
    ("name", "options", "device", "group_size", "expected"),
    [
        ("brightness", {}, "cuda", 24, False),  # next to no time
        ("ocr", {}, "cpu", 24, False),  # it would take the cores from the policy
        ("ocr", {}, "cuda", 24, True),
        ("remote", {"url": "http://127.0.0.1:1"}, "cpu", 24, True),
        ("remote", {"url": "http://127.0.0.1:1", "batch": 16}, "cpu", 8, False),  # two groups go into a request
        ("vlm_judge", {"url": "http://127.0.0.1:1", "model": "m", "concurrency": 8}, "cuda", 8, True),
        ("vlm_judge", {"url": "http://127.0.0.1:1", "model": "m", "concurrency": 8}, "cuda", 4, False),
    ],
)
def test_which_rewards_overlap(name: str, options: dict, device: str, group_size: int, expected: bool) -> None:
    if name == "ocr":
        pytest.importorskip("rapidocr")
    assert make_reward(name, options).overlaps(torch.device(device), group_size) is expected
