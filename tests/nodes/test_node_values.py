"""What flows along the edges, its keys, and numbers out of other nodes' outputs; no ComfyUI."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from node_files import node_file

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.settings.config import (
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    RewardTerm,
    RolloutConfig,
    TrainingConfig,
)

values, numbers = node_file("common.values"), node_file("common.numbers")
SPEC = values.PolicySpec("run", 0, ModelConfig(), LoraConfig(), MemoryConfig())
HANDLE = values.PolicyHandle(SPEC, 0, "root")
SAMPLER = values.Sampler(RolloutConfig())
KEY_BEFORE = "de7d8cac99e1639a"  # by commit 2bc388f


def groups(*sizes: int, key: str = "drawn", handle: Any = HANDLE) -> Any:
    """Groups of so many black images."""
    made = [
        Group(Prompt(f"prompt {n}"), tuple(range(n)), torch.zeros(n, 1, 1, 1), torch.zeros(n, 3, 8, 8)) for n in sizes
    ]
    return values.Groups(tuple(made), handle, SAMPLER, 0, key)


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        1,
        0.1,
        "text",
        None,
        True,
        ("a", 1),
        {"b": 1, "a": (2, 3)},
        LoraConfig(rank=4),
        RewardTerm("clip_score", 0.5, {"model": "x"}),
        [(0, "a prompt", {"include": [{"shape": "circle"}]})],
    ],
)
def test_equal_values_have_equal_keys(value: Any) -> None:
    again = replace(value) if hasattr(value, "__dataclass_fields__") else value
    assert values.key_of("what", value) == values.key_of("what", again)
    assert len(values.key_of(value)) == 16


def test_a_step_of_a_run_of_the_version_before_has_the_key_that_it_had() -> None:
    keys = node_file("runs.keys")
    after = keys.learned(values.PolicyHandle(SPEC, 0, "x"), "groups", values.Training(TrainingConfig()))
    assert after.state == KEY_BEFORE
    for changes in ({"kl_target": 0.1}, {"norm_guard": 0.1}):
        other = values.Training(replace(TrainingConfig(), **changes))
        assert keys.learned(values.PolicyHandle(SPEC, 0, "x"), "groups", other).state != KEY_BEFORE


def test_the_order_of_a_mapping_does_not_matter() -> None:
    assert values.key_of({"a": 1, "b": 2}) == values.key_of({"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (1, "1"),
        (0.1, 0.1 + 1e-16),
        ("a", "b"),
        (["a", "b"], ["ab"]),
        (["a", "b"], ["b", "a"]),
        (LoraConfig(rank=4), LoraConfig(rank=8)),
        (ModelConfig(), LoraConfig()),
        (RewardTerm("a", 1.0), RewardTerm("a", -1.0)),
        (RewardTerm("a", options={"x": 1}), RewardTerm("a", options={"x": 2})),
    ],
)
def test_other_values_have_other_keys(one: Any, other: Any) -> None:
    assert values.key_of(one) != values.key_of(other)


def test_parts_do_not_run_into_each_other() -> None:
    assert values.key_of("a", "b") != values.key_of("ab")
    assert values.key_of(["a"], "b") != values.key_of("a", ["b"])


def test_what_has_no_plain_value_has_no_key() -> None:
    with pytest.raises(TypeError):
        values.key_of(object())


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_go_to_the_images_in_their_order() -> None:
    scored = values.with_scores(groups(2, 3), [1, 2, 3, 4, 5.5], "mine")
    assert [group.scores["mine"].tolist() for group in scored.groups] == [[1, 2], [3, 4, 5.5]]
    assert scored.terms == (RewardTerm("mine"),)


def test_the_key_tells_the_scores() -> None:
    drawn = groups(2)
    keys = [values.with_scores(drawn, scores, "mine").key for scores in ([1, 2], [2, 1])]
    keys += [values.with_scores(drawn, [1, 2], "yours").key, drawn.key]
    assert len(set(keys)) == 4
    assert values.with_scores(groups(2), [1, 2], "mine").key == keys[0]


@pytest.mark.parametrize("count", [0, 4, 6])
def test_a_wrong_count_is_one_sentence(count: int) -> None:
    with pytest.raises(UserError, match=f"^There are {count} scores for 5 images: give one number per image.$"):
        values.with_scores(groups(2, 3), [0.0] * count, "mine")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(UserError, match="not a finite number"):
        values.with_scores(groups(2), [1.0, bad], "mine")


def test_groups_are_joined_in_their_order() -> None:
    first, second = values.with_scores(groups(2), [1, 2], "r"), values.with_scores(groups(3), [3, 4, 5], "r")
    joined = second.after(first)
    assert [len(group) for group in joined.groups] == [2, 3]
    assert joined.key not in (first.key, second.key, first.after(second).key)


def test_groups_that_do_not_fit_are_not_joined() -> None:
    scored = values.with_scores(groups(2), [1, 2], "r")
    with pytest.raises(UserError, match="^Groups can be joined only where"):
        scored.after(values.with_scores(groups(2), [1, 2], "other"))
    with pytest.raises(UserError, match="^Groups can be joined only where"):
        scored.after(values.with_scores(groups(2, handle=replace(HANDLE, step=1, state="x")), [1, 2], "r"))


def test_groups_of_another_size_are_not_joined() -> None:
    wide = groups(2)
    wide = replace(wide, groups=tuple(replace(group, images=torch.zeros(2, 3, 8, 16)) for group in wide.groups))
    with pytest.raises(UserError, match="only where their images are of one size, not 8 x 8 and 16 x 8"):
        wide.after(groups(2))


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (3, [3.0]),
        (True, [1.0]),
        ([1, 2.5], [1.0, 2.5]),
        ([[1, 2], (3,)], [1.0, 2.0, 3.0]),
        ("5 3 1 4", [5.0, 3.0, 1.0, 4.0]),
        ("0.5, -2\n+1e-3;.25 7.", [0.5, -2.0, 0.001, 0.25, 7.0]),
        ("nothing", []),
        ({"a": 1, "b": [2, 3]}, [1.0, 2.0, 3.0]),
        (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
        (torch.tensor(4), [4.0]),
        (torch.tensor([True, False]), [1.0, 0.0]),
        (np.array([1, 2]), [1.0, 2.0]),
        (np.float32(0.5), [0.5]),
        ((n for n in (1, 2)), [1.0, 2.0]),
    ],
)
def test_numbers_are_found_in_order(value: Any, found: list[float]) -> None:
    assert numbers.numbers_in(value) == found


def test_a_mask_gives_the_mean_of_each_image() -> None:
    mask = torch.stack([torch.zeros(4, 4), torch.full((4, 4), 0.5), torch.eye(4)])
    assert numbers.numbers_in(mask) == [0.0, 0.5, 0.25]
    assert numbers.numbers_in([mask]) == [0.0, 0.5, 0.25]
    assert numbers.numbers_in([mask[:1], mask[2:]]) == [0.0, 0.25]


def test_half_precision_loses_no_mean() -> None:
    assert numbers.numbers_in(torch.ones(2, 512, 512, dtype=torch.float16)) == [1.0, 1.0]


@pytest.mark.parametrize("value", [None, object(), [1, None]])
def test_what_holds_no_numbers_is_told_in_one_sentence(value: Any) -> None:
    with pytest.raises(
        UserError, match="^No scores can be read from a [A-Za-z]+: connect numbers, a list, a text or a"
    ):
        numbers.numbers_in(value)
