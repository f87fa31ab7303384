"""What can go wrong in a reward: a sentence with its name and the sample; the run stops with a checkpoint, or skips."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bright import Bright
from engine import SIZE, everything, make_trainer, quick, write_quick
from torch import Tensor

from dgpo_core import rewards as registry
from dgpo_core.common.distributed import World
from dgpo_core.common.errors import Exhausted, UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.evaluation.evaluator import Evaluator, Watch
from dgpo_core.evaluation.held_out import HeldOut
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.rewards import Reward, score_groups
from dgpo_core.train import main

PROMPTS = [Prompt("red"), Prompt("blue")]


class Picky(Bright):
    """Fails on the prompt "blue"."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        if "blue" in prompts:
            raise ValueError("no blue, please.\nsecond line")
        return super().score(images, prompts, metadata)


class Broken(Bright):
    """NaN on the prompt "blue"."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return torch.where(torch.tensor([p == "blue" for p in prompts]), torch.nan, images.mean((1, 2, 3)))


class Lister(Reward):
    """A list, not a tensor."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Any:
        return [1.0] * len(images)


class Crowd(Reward):
    """Fails on more than one image."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        if len(images) > 1:
            raise RuntimeError("too many")
        return torch.zeros(1)


class Never(Reward):
    """Fails always."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        raise KeyError("gone")


def group(text: str, size: int = 2) -> Group:
    return Group(Prompt(text), tuple(range(size)), torch.zeros(size, 1), torch.rand(size, 3, 4, 4))


def test_any_exception_of_a_reward_becomes_a_sentence_with_reward_and_sample() -> None:
    says = r"^Reward 'picky' failed on sample 2 \('blue'\) with ValueError: no blue, please\.$"
    with pytest.raises(UserError, match=says) as error:
        score_groups([group("red"), group("blue")], {"picky": Picky()})
    assert isinstance(error.value.__cause__, ValueError)


def test_what_fails_only_together_names_all_samples() -> None:
    with pytest.raises(UserError, match=r"failed on samples 0 to 3 \('red', ...\) with RuntimeError: too many"):
        score_groups([group("red"), group("blue")], {"crowd": Crowd()})


def test_what_is_no_tensor_is_told() -> None:
    with pytest.raises(UserError, match="'lister' returned list: it must return a tensor"):
        score_groups([group("red")], {"lister": Lister()})


def trainer_with(policy: DiffusersPolicy, reward: Reward, **changes: Any) -> Trainer:
    config = quick(rollout={"steps": 3}, **changes)
    return Trainer(policy, PROMPTS, {"bright": reward}, config, size=SIZE)


@pytest.mark.parametrize("reward", [Picky(), Broken()])
def test_a_group_that_is_skipped_trains_nothing_and_is_counted_and_told(
    policy: DiffusersPolicy, reward: Reward
) -> None:
    done = trainer_with(policy, reward, on_bad_score="skip").iterate()
    assert done.metrics["skipped"] == 1
    assert [g.prompt.text for g in done.groups] == ["red"]
    assert any("1 group(s) left out: Reward 'bright'" in warning and "'blue'" in warning for warning in done.warnings)


def test_skipping_a_group_is_the_same_as_not_having_drawn_it(policy: DiffusersPolicy) -> None:
    fresh = {n: {k: p.detach().clone() for k, p in policy.adapter_state(n).items()} for n in ("current", "old", "ema")}
    trainer_with(policy, Picky(), on_bad_score="skip").iterate()
    skipped = everything(policy)
    for name, state in fresh.items():
        for key, value in state.items():
            policy.adapter_state(name)[key].data.copy_(value)
    trainer = make_trainer(policy, quick(rollout={"steps": 3}), PROMPTS)
    mine = [(place, p) for place, p in enumerate(trainer.stream.at(0)) if p.text == "red"]
    groups = score_groups(trainer.step.draw(list(enumerate(trainer.stream.at(0)))), {"bright": Bright()})
    trainer.step.learn([g for g in groups if g.prompt.text == "red"], [place for place, _ in mine])
    torch.testing.assert_close(everything(policy), skipped, atol=1e-7, rtol=1e-5)  # one group is scored at a time


def test_an_iteration_without_any_group_trains_nothing_and_the_run_goes_on(policy: DiffusersPolicy) -> None:
    trainer, before = trainer_with(policy, Never(), on_bad_score="skip"), everything(policy)
    done = trainer.iterate()
    assert (trainer.iteration, done.metrics["skipped"], done.metrics["informative"]) == (1, 2, 0)
    assert any("no group could be scored" in warning for warning in done.warnings)
    assert torch.equal(everything(policy), before)
    trainer.rewards["bright"] = Bright()
    assert trainer.iterate().metrics["informative"] == 1


class Spent(Reward):
    """One whose means are used up."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        raise Exhausted("The reward 'spent': no more calls.")


def test_a_reward_whose_means_are_used_up_stops_the_run_all_the_same(policy: DiffusersPolicy) -> None:
    trainer = trainer_with(policy, Spent(), on_bad_score="skip")
    with pytest.raises(Exhausted, match="no more calls"):
        trainer.iterate()
    assert trainer.iteration == 0


def test_an_evaluation_leaves_out_what_cannot_be_scored_where_the_training_does(policy: DiffusersPolicy) -> None:
    told: list[str] = []
    config = quick(rollout={"steps": 3}, on_bad_score="skip")
    held_out = HeldOut.of(config, policy, PROMPTS, {"picky": Picky()}, SIZE, World("cpu"), tell=told.append)
    assert held_out.score(None, 4).places[:, 0].unique().tolist() == [0]  # of red, blue
    assert told == ["Warning: 1 prompts are left out of an evaluation. Reward 'picky' failed on sample 0 ('blue') with"
                    " ValueError: no blue, please."]  # fmt: skip
    watch = Watch({"picky": 1.0}, {"picky": 1.0}, ["picky"])
    assert Evaluator(held_out, watch).samples(0, None, PROMPTS).startswith(b"\x89PNG")
    with pytest.raises(UserError, match="Nothing of an evaluation could be scored. Reward 'never' failed"):
        replace(held_out, judges={"never": Never()}).score(None, 4)
    with pytest.raises(UserError, match="no blue, please"):
        replace(held_out, skip=False).score(None, 4)


def test_after_ten_such_iterations_in_a_row_the_run_stops(policy: DiffusersPolicy) -> None:
    trainer = trainer_with(policy, Never(), on_bad_score="skip")
    for _ in range(9):
        trainer.iterate()
    with pytest.raises(UserError, match=r"No group of 10 iterations in a row could be scored. Reward 'bright' failed"):
        trainer.iterate()
    assert trainer.iteration == 9
    trainer.rewards["bright"] = Bright()
    trainer.iterate()
    trainer.rewards["bright"] = Never()
    trainer.iterate()  # it counts anew


def test_otherwise_the_iteration_ends_with_the_weights_as_they_were(policy: DiffusersPolicy) -> None:
    before = everything(policy)
    trainer = trainer_with(policy, Picky())
    with pytest.raises(UserError, match="'blue'"):
        trainer.iterate()
    assert torch.equal(everything(policy), before)
    assert trainer.iteration == 0


class FailsLater(Bright):
    """Fails from its seventh call on: in the third iteration, as the run scores twice before and once in each."""

    calls = 0

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        FailsLater.calls += 1
        if FailsLater.calls > 4:
            raise OSError("the disk is gone")
        return super().score(images, prompts, metadata)


@pytest.mark.slow
def test_a_failing_reward_ends_the_run_with_its_state_saved(
    sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(registry.REWARDS, "later", f"{__name__}:FailsLater")
    monkeypatch.chdir(tmp_path)
    options = {"reward": "later", "evaluation": {"every": 0}, "checkpoint": {"every": 100}, "iterations": 5}
    assert main(write_quick(tmp_path, sd3_folder, **options)) == 2
    assert "error: Reward 'later' failed on sample 0" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "runs/test/checkpoints").glob("step_*")] == ["step_000002.safetensors"]
    records = [json.loads(line) for line in (tmp_path / "runs/test/metrics.jsonl").read_text().splitlines()]
    assert max(r["iteration"] for r in records) == 2
