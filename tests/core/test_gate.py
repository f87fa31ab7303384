"""Conditions on rewards ("only if OCR > 0.5"), by hand; and what settings say of rewards."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bright import Bright, Red
from engine import make_trainer, quick

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.method.gating import counted
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.runs.options import parse_args
from dgpo_core.settings.config import Config, RewardTerm
from dgpo_core.settings.gates import Gate
from dgpo_core.settings.resuming import differences
from dgpo_core.settings.validation import validate
from dgpo_core.settings.values import from_dict, read_rewards, show_rewards, to_dict

# two groups of four: pickscore, and how well a text is spelt
PICK = torch.tensor([[20.0, 21.0, 23.0, 19.0], [5.0, 6.0, 7.0, 8.0]])
OCR = torch.tensor([[0.9, 0.6, 0.5, 0.0], [0.1, 0.2, 0.0, 0.5]])


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("ocr>0.5", Gate("ocr", True, 0.5)),
        (" ocr < 1e-1 ", Gate("ocr", False, 0.1)),
        ("my/rewards.py:Nice > -2", Gate("my/rewards.py:Nice", True, -2.0)),
    ],
)
def test_a_condition_is_a_reward_a_sign_and_a_number(text: str, gate: Gate) -> None:
    assert Gate.of(text, "pickscore") == gate


@pytest.mark.parametrize(
    "text", ["ocr", "ocr >", "> 0.5", "ocr = 0.5", "ocr >= 0.5", "ocr > nan", "0 < ocr < 1", "ocr > inf"]
)
def test_other_conditions_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"condition of the reward pickscore must be .* such as ocr > 0.5"):
        Gate.of(text, "pickscore")


def test_what_fails_counts_as_the_groups_worst() -> None:
    term = RewardTerm("pick", only_if="ocr > 0.5")
    found = counted({"pick": PICK, "ocr": OCR}, term, 1.0)
    # group 1: the third (0.5 is not above 0.5) and the fourth fail and get the lowest, 19; group 2: all fail
    assert found.tolist() == [[20.0, 21.0, 19.0, 19.0], [5.0, 5.0, 5.0, 5.0]]


def test_with_a_negative_weight_the_worst_is_the_highest() -> None:
    found = counted({"pick": PICK, "ocr": OCR}, RewardTerm("pick", -1.0, only_if="ocr > 0.5"), -1.0)
    assert found[0].tolist() == [20.0, 21.0, 23.0, 23.0]


def test_below_is_the_other_side() -> None:
    found = counted({"pick": PICK, "ocr": OCR}, RewardTerm("pick", only_if="ocr < 0.5"), 1.0)
    assert found.tolist() == [[19.0, 19.0, 19.0, 19.0], [5.0, 6.0, 7.0, 5.0]]


def test_without_a_condition_nothing_changes() -> None:
    assert torch.equal(counted({"pick": PICK}, RewardTerm("pick"), 1.0), PICK)


def groups() -> list[Group]:
    scores = [{"bright": PICK[i], "red": OCR[i]} for i in range(2)]
    return [Group(Prompt("a"), (0, 1, 2, 3), torch.zeros(4, 1), torch.zeros(4, 3, 1, 1), s) for s in scores]


@pytest.mark.parametrize("combine", ["sum", "normalised"])
def test_a_group_in_which_all_fail_teaches_nothing_and_what_passes_beats_what_fails(
    policy: DiffusersPolicy, combine: str
) -> None:
    config = quick(reward="bright=2?red>0.5,red=0", combine=combine, training={"advantage_std": "group"})
    _, A = make_trainer(policy, config).step._advantages(groups())
    assert torch.equal(A[1], torch.zeros(4))
    # group 1 counts 20, 21, 19, 19: mean 19.75, squares .0625 + 1.5625 + .5625 + .5625 = 2.75, deviation sqrt(2.75 / 4)
    std = (2.75 / 4) ** 0.5
    factor = 1 if combine == "sum" else 2  # of a sum, the weight falls out
    assert A[0].tolist() == pytest.approx([factor * x / std for x in (0.25, 1.25, -0.75, -0.75)], rel=1e-3)


def test_where_all_fail_the_condition_itself_can_still_teach(policy: DiffusersPolicy) -> None:
    _, A = make_trainer(policy, quick(reward="bright=1?red>0.5,red=1")).step._advantages(groups())
    assert A[1].argmax() == 3  # 0.5, the nearest to passing
    assert A[1].argmin() == 2


def test_each_reward_is_logged_apart_as_it_was_given_with_the_share_that_failed(policy: DiffusersPolicy) -> None:
    trainer = make_trainer(policy, quick(reward="bright=1?red>0.5,red=0"))
    done = trainer.iterate()
    bright = torch.stack([Bright().score(g.images, [], []) for g in done.groups])
    red = torch.stack([Red().score(g.images, [], []) for g in done.groups])
    assert done.metrics["reward/bright"] == pytest.approx(float(bright.mean()), abs=1e-6)
    assert done.metrics["reward_std/bright"] == pytest.approx(float(bright.std(1, correction=0).mean()), abs=1e-6)
    assert done.metrics["reward/red"] == pytest.approx(float(red.mean()), abs=1e-6)
    assert done.metrics["gated/bright"] == pytest.approx(float((red <= 0.5).float().mean()))
    assert "gated/red" not in done.metrics


# --- settings --------------------------------------------------------------------------------------------------------

TERMS = (RewardTerm("pickscore", 1.0, {}, "ocr > 0.5"), RewardTerm("ocr", 0.0))


def test_conditions_go_through_the_command_line_yaml_and_metadata() -> None:
    from dgpo_core.runs.options import parse_args

    read = parse_args(["--reward", "pickscore=1?ocr > 0.5,ocr=0"]).reward
    assert read == TERMS
    assert read_rewards(show_rewards(TERMS)) == TERMS
    config = replace(Config(), reward=TERMS)
    assert from_dict(to_dict(config)).reward == TERMS
    assert read_rewards([{"name": "pickscore", "only_if": "ocr > 0.5"}, {"name": "ocr", "weight": 0}]) == TERMS
    assert read_rewards("a?b>1") == (RewardTerm("a", 1.0, {}, "b>1"),)


@pytest.mark.parametrize(
    ("rewards", "says"),
    [
        ("pickscore?ocr>0.5", "asks for ocr, which is not among the rewards: add it, with a weight of 0"),
        ("pickscore=1,ocr=0", "weight of the reward ocr must be a number other than 0"),
        ("a=0?b>1,b=0?a>1", "All rewards have a weight of 0"),
        ("pickscore?nonsense", "condition of the reward pickscore"),
    ],
)
def test_conditions_that_cannot_work_are_told(rewards: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        validate(replace(Config(), reward=read_rewards(rewards)))


def test_a_condition_may_not_change_on_resume() -> None:
    old = replace(Config(), reward=TERMS)
    new = replace(old, reward=(replace(TERMS[0], only_if="ocr > 0.6"), TERMS[1]))
    assert list(differences(old, new)) == ["reward"]


@pytest.mark.parametrize("name", ["reward", "watch"])
def test_an_option_goes_before_several_rewards_of_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{name}: [saturation, entropy]\n")
    assert getattr(parse_args(["--config", str(path), f"--{name}", "brightness"]), name) == (RewardTerm("brightness"),)
