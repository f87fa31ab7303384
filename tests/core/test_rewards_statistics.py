"""Statistics of pictures whose value is known."""

import io
import math

import pytest
import torch
from PIL import Image
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.rewards import REWARDS, make_reward

NAMES = ("jpeg_size", "edge_density", "entropy", "brightness", "saturation")


def flat(red: float, green: float, blue: float, size: int = 32) -> Tensor:
    return torch.tensor([red, green, blue]).view(1, 3, 1, 1).expand(1, 3, size, size).clone()


def score(name: str, images: Tensor, **options: object) -> Tensor:
    return make_reward(name, options).score(images, ["a"] * len(images), [{}] * len(images))


@pytest.mark.parametrize("name", NAMES)
def test_one_number_per_image_within_the_range(name: str) -> None:
    torch.manual_seed(0)
    images = torch.cat([torch.rand(2, 3, 24, 40), torch.zeros(1, 3, 24, 40), torch.ones(1, 3, 24, 40)])
    reward = make_reward(name)
    scores = reward.score(images, ["a"] * 4, [{}] * 4)
    low, high = reward.range
    assert scores.shape == (4,)
    assert scores.dtype == torch.float32
    assert ((scores >= low) & (scores <= high)).all()
    each = torch.cat([reward.score(image[None], ["a"], [{}]) for image in images])
    torch.testing.assert_close(scores, each)


def test_brightness_is_bt601_luma() -> None:
    images = torch.cat([flat(1, 1, 1), flat(0, 0, 0), flat(1, 0, 0), flat(0, 0.5, 0.5)])
    torch.testing.assert_close(score("brightness", images), torch.tensor([1, 0, 0.299, 0.5 * 0.587 + 0.5 * 0.114]))


def test_saturation_is_that_of_hsv() -> None:
    images = torch.cat([flat(0.5, 0.5, 0.5), flat(0, 0, 0), flat(1, 0, 0), flat(0.8, 0.4, 0.6)])
    torch.testing.assert_close(score("saturation", images), torch.tensor([0, 0, 1, 0.5]))


def test_entropy_counts_bits() -> None:
    levels = torch.arange(256).float().div(255).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    two = torch.cat([flat(0, 0, 0, 16)[..., :8], flat(1, 1, 1, 16)[..., :8]], dim=-1)
    images = torch.cat([flat(0.3, 0.3, 0.3, 16), two, levels])
    torch.testing.assert_close(score("entropy", images), torch.tensor([0.0, 1.0, 8.0]), atol=1e-5, rtol=0)


def test_edge_density_of_one_edge() -> None:
    image = flat(0, 0, 0, 18)
    image[..., 9:] = 1  # the gradient of a step reaches one pixel to either side: 2 of the 16 inner columns
    ramp = torch.arange(18).float().div(17).view(1, 1, 1, 18).expand(1, 3, 18, 18)  # 0.059 per pixel
    images = torch.cat([flat(0.5, 0.5, 0.5, 18), image, image.mT, ramp])
    torch.testing.assert_close(score("edge_density", images), torch.tensor([0, 2 / 16, 2 / 16, 0]))
    torch.testing.assert_close(score("edge_density", images, threshold=0.05)[3], torch.tensor(1.0))


def test_jpeg_size_is_that_of_the_file() -> None:
    torch.manual_seed(0)
    noise = torch.rand(1, 3, 32, 32)
    sizes = score("jpeg_size", torch.cat([noise, flat(0.5, 0.5, 0.5)]))
    buffer = io.BytesIO()
    pixels = (noise[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    assert math.isclose(float(sizes[0]), len(buffer.getvalue()) / 1000, rel_tol=1e-6)
    assert sizes[0] > 2 * sizes[1]


def test_group_diversity_is_the_mean_distance_to_the_others() -> None:
    images = torch.cat([flat(v, v, v) for v in (0.0, 0.5, 1.0, 0.2, 0.2, 0.9)])
    prompts = ["a", "a", "a", "b", "b", "a"]
    scores = make_reward("group_diversity").score(images, prompts, [{}] * 6)
    torch.testing.assert_close(scores, torch.tensor([0.75, 0.5, 0.75, 0.0, 0.0, 0.0]))
    assert make_reward("group_diversity").score(images[:0], [], []).shape == (0,)


def test_group_diversity_is_of_composition_not_noise() -> None:
    torch.manual_seed(0)
    noisy = flat(0.5, 0.5, 0.5, 256) + (torch.rand(4, 3, 256, 256) - 0.5) / 2
    half = torch.cat([flat(0, 0, 0, 256)[..., :128], flat(1, 1, 1, 256)[..., :128]], dim=-1)
    assert score("group_diversity", noisy).max() < 0.05
    torch.testing.assert_close(score("group_diversity", torch.cat([half, half.flip(-1)])), torch.ones(2))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("jpeg_size", {"quality": 200}, "quality"),
        ("edge_density", {"threshold": "high"}, "threshold"),
        ("group_diversity", {"side": 0}, "side"),
        ("entropy", {"bins": 3}, "'entropy' does not take these options"),
    ],
)
def test_wrong_options(name: str, options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_reward(name, options)


def test_every_reward_of_the_list_can_be_imported() -> None:
    import importlib
    import inspect

    for entry in REWARDS.values():
        module, _, attribute = entry.partition(":")
        cls = getattr(importlib.import_module(module), attribute)
        low, high = cls.range
        assert low < high
        assert cls.__doc__
        assert bool(cls.weights or cls.packages) == bool(cls.licence)
        assert all(weights.size and weights.option in inspect.signature(cls).parameters for weights in cls.weights)
