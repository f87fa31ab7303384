"""Rewards: what groups are scored with, and that the shapes verifier is never fooled by its own world."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from bright import Bright, Red
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.demo import world
from dgpo_core.rewards import REWARDS, Reward, make_reward, score_groups
from dgpo_core.rewards.shapes import Shapes, ShapesGraded


def group(text: str, brightness: Sequence[float]) -> Group:
    images = torch.tensor(brightness).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    return Group(Prompt(text), tuple(range(len(images))), torch.zeros(len(images), 4, 4, 4), images)


class Fixed(Reward):
    """Whatever it is given."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.scores


def test_every_group_gets_its_own_scores_of_every_reward() -> None:
    groups = [group("a", [0.1, 0.2]), group("b", [0.3, 0.4, 0.5])]
    scored = score_groups(groups, {"bright": Bright(), "red": Red()})
    assert scored[0].scores["bright"].tolist() == pytest.approx([0.1, 0.2])
    assert scored[1].scores["bright"].tolist() == pytest.approx([0.3, 0.4, 0.5])
    assert set(scored[1].scores) == {"bright", "red"}
    assert groups[0].scores == {}  # groups are values
    assert score_groups([], {"bright": Bright()}) == []


def test_a_reward_sees_the_prompt_and_metadata_of_every_image() -> None:
    seen = []

    class Spy(Reward):
        def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
            seen.extend(zip(prompts, metadata, strict=True))
            return torch.zeros(len(images))

    one = Group(Prompt("a", {"x": 1}), (0, 1), torch.zeros(2, 4, 4, 4), torch.zeros(2, 3, 8, 8))
    score_groups([one, group("b", [0.5])], {"spy": Spy()})
    assert seen == [("a", {"x": 1}), ("a", {"x": 1}), ("b", {})]


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), ()])
def test_scores_of_a_wrong_shape_are_told(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"'odd' returned scores of shape .* for 3 images"):
        score_groups([group("a", [0.1, 0.2, 0.3])], {"odd": Fixed(torch.zeros(shape))})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_is_told_with_its_sample(value: float) -> None:
    groups = [group("first", [0.1, 0.2]), group("second", [0.3, 0.4])]
    with pytest.raises(UserError, match=r"'odd' returned .* for sample 2 \('second'\)"):
        score_groups(groups, {"odd": Fixed(torch.tensor([0.0, 0.0, value, 0.0]))})


def test_scores_may_come_in_any_type_and_with_gradients() -> None:
    scores = torch.tensor([1, 0], dtype=torch.float64, requires_grad=True)
    (scored,) = score_groups([group("a", [0.1, 0.2])], {"odd": Fixed(scores)})
    assert scored.scores["odd"].dtype == torch.float32
    assert not scored.scores["odd"].requires_grad


def test_an_unknown_reward_or_option_is_told() -> None:
    with pytest.raises(UserError, match="did you mean 'shapes'"):
        make_reward("shape")
    with pytest.raises(UserError, match="size"):
        make_reward("shapes", {"size": 3})


def test_every_named_reward_of_the_demo_can_be_made() -> None:
    assert isinstance(make_reward("shapes"), Shapes)
    assert isinstance(make_reward("shapes_graded"), ShapesGraded)
    assert {"shapes", "shapes_graded"} <= set(REWARDS)


# --- the shapes verifier ---------------------------------------------------------------------------------------------

COUNT = 400


@pytest.fixture(scope="module")
def scenes() -> tuple[list[world.Scene], list[world.Scene], Tensor]:
    """Scenes of all categories, the same with one fact wrong, and pictures of the first."""
    rng, table = random.Random(5), world.by_category()
    right = [rng.choice(table[world.CATEGORIES[i % 5]]) for i in range(COUNT)]
    wrong = [world.mislabel(scene, rng) for scene in right]
    pictures = [torch.from_numpy(world.draw(world.place(scene, rng), rng).picture) for scene in right]
    return right, wrong, torch.stack(pictures).permute(0, 3, 1, 2).float() / 255


def score(reward: Reward, images: Tensor, scenes: Sequence[world.Scene]) -> Tensor:
    return reward.score(images, [s.prompt() for s in scenes], [s.metadata() for s in scenes])


@pytest.mark.slow
def test_every_picture_of_the_world_is_right_for_its_own_prompt(scenes: Any) -> None:
    right, _, images = scenes
    assert score(Shapes(), images, right).tolist() == [1.0] * COUNT
    assert score(ShapesGraded(), images, right).tolist() == pytest.approx([1.0] * COUNT)


@pytest.mark.slow
def test_no_picture_is_right_for_a_prompt_with_one_wrong_fact(scenes: Any) -> None:
    right, wrong, images = scenes
    # "a circle and a square" with no colours named: the picture of one is right for no prompt that differs in meaning
    assert all(a.meaning() != b.meaning() for a, b in zip(right, wrong, strict=True))
    assert score(Shapes(), images, wrong).tolist() == [0.0] * COUNT
    graded = score(ShapesGraded(), images, wrong)
    assert graded.min() >= 0
    assert graded.max() < 1.0
    assert graded.mean() > 0.2  # something is right, and the graded verifier says so


@pytest.mark.slow
def test_a_picture_is_wrong_for_prompts_drawn_at_random(scenes: Any) -> None:
    right, _, images = scenes
    others = right[7:] + right[:7]  # 7: of other categories
    expected = [float(a.meaning() == b.meaning()) for a, b in zip(right, others, strict=True)]
    found = score(Shapes(), images, others).tolist()
    # "a circle and a triangle" names no colours, so a picture of a red circle and a blue triangle is right for it
    free = [b.category == "two_object" for b in others]
    assert all(f == e for f, e, skip in zip(found, expected, free, strict=True) if not skip)
    assert sum(free) < COUNT / 2


def test_an_empty_picture_and_noise_are_right_for_nothing(scenes: Any) -> None:
    right, _, _ = scenes
    noise = torch.rand(50, 3, world.SIZE, world.SIZE, generator=torch.Generator().manual_seed(0))
    for images in (torch.full_like(noise, 0.93), noise):
        assert score(Shapes(), images, right[:50]).tolist() == [0.0] * 50
        assert score(ShapesGraded(), images, right[:50]).max() < 0.5


def test_the_verifier_is_deterministic(scenes: Any) -> None:
    right, wrong, images = scenes
    for prompts in (right[:40], wrong[:40]):
        first = score(ShapesGraded(), images[:40], prompts)
        assert torch.equal(first, score(ShapesGraded(), images[:40], prompts))


def test_images_or_metadata_that_it_cannot_judge_are_told(scenes: Any) -> None:
    right, _, images = scenes
    with pytest.raises(UserError, match="64 x 64 pixels, not"):
        score(Shapes(), images[:1, :, :32, :32], right[:1])
    with pytest.raises(UserError, match='"include"'):
        Shapes().score(images[:1], ["a red circle"], [{}])
