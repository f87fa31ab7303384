"""Drawing groups: the initial noise is the only chance, and the batch is not a part of it."""

import pytest
import torch
from engine import PROMPTS, SIZE, Calls, moved

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.method.rollout import nothing, rollout
from dgpo_core.policy.pipeline import DiffusersPolicy

SEEDS = [[11, 12, 13], [21, 22, 23]]
# One sample's row in a batch of another height: matrix products may sum in another order.
CLOSE = 1e-5


def draw(policy: DiffusersPolicy, **options: object) -> list[Group]:
    settings = {"seeds": SEEDS, "prompts": PROMPTS, "check": nothing, **options}
    return rollout(policy, policy.solver("euler", 3, *SIZE), size=SIZE, **settings)


def test_one_group_per_prompt_with_latents_and_images_of_its_seeds(policy: DiffusersPolicy) -> None:
    groups = draw(policy)
    assert [group.prompt for group in groups] == PROMPTS
    assert [group.seeds for group in groups] == [(11, 12, 13), (21, 22, 23)]
    for group in groups:
        assert len(group) == 3
        assert group.latents.shape == (3, 4, 8, 8)
        assert group.images.shape == (3, 3, *SIZE)
        assert (group.latents.dtype, group.images.dtype) == (torch.float32, torch.float32)
        assert 0 <= group.images.min() < group.images.max() <= 1
        assert torch.allclose(policy.decode(group.latents), group.images, atol=CLOSE)
        assert not group.latents.requires_grad


def test_the_same_seed_gives_the_same_image_and_another_one_another(policy: DiffusersPolicy) -> None:
    first, second = draw(policy), draw(policy)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(first, second, strict=True))
    latents = torch.cat([group.latents for group in first]).flatten(1)
    assert torch.pdist(latents).min() > 0.1


def test_a_sample_does_not_depend_on_what_is_drawn_with_it(policy: DiffusersPolicy) -> None:
    whole = draw(policy)
    for batch in (1, 2, 4, 5):
        for a, b in zip(draw(policy, batch=batch), whole, strict=True):
            assert torch.allclose(a.latents, b.latents, atol=CLOSE)
    (alone,) = draw(policy, prompts=PROMPTS[1:], seeds=[[22]])
    assert torch.allclose(alone.latents[0], whole[1].latents[1], atol=CLOSE)


def test_groups_may_be_of_different_sizes(policy: DiffusersPolicy) -> None:
    groups = draw(policy, seeds=[[11], [21, 22, 23]], batch=2)
    assert [len(group) for group in groups] == [1, 3]
    assert torch.allclose(groups[1].latents, draw(policy)[1].latents, atol=CLOSE)


@pytest.mark.parametrize("batch", [0, 1, 4])
def test_the_batch_bounds_every_forward(batch: int, policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(policy, monkeypatch)
    draw(policy, batch=batch)
    assert max(rows for _, rows, _ in calls) == (batch or 6)
    assert calls.rows("current") == 3 * 6  # 3 steps
    assert not any(grad for _, _, grad in calls)


def test_guidance_takes_one_forward_of_twice_the_rows_and_the_negative_prompt(
    policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = draw(policy)
    calls = Calls(policy, monkeypatch)
    guided = draw(policy, cfg=4.5)
    assert [rows for _, rows, _ in calls] == [12, 12, 12]
    negative = draw(policy, cfg=4.5, negative_prompt="two")
    assert not torch.allclose(guided[0].latents, without[0].latents, atol=1e-3)
    assert not torch.allclose(guided[0].latents, negative[0].latents, atol=1e-3)


def test_the_active_adapter_draws(policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    moved(policy, "current", seed=1)
    calls = Calls(policy, monkeypatch)
    with policy.using("old"):
        old = draw(policy)
    assert calls.adapters() == {"old"}
    assert not torch.allclose(draw(policy)[0].latents, old[0].latents, atol=1e-3)


def test_a_scheduler_of_comfyui_is_refused_in_one_sentence(policy: DiffusersPolicy) -> None:
    with pytest.raises(UserError, match="'karras' is one of ComfyUI's, for native policies: leave rollout.scheduler"):
        policy.solver("euler", 3, *SIZE, scheduler="karras")


def test_a_roll_out_can_be_stopped_before_every_forward(
    policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(policy, monkeypatch)
    asked = []

    def check() -> None:
        asked.append(len(calls))
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), policy.using("old"):
        draw(policy, batch=3, check=check)
    assert asked == [0, 1, 2, 3, 4]
    assert policy.adapters.active == "current"


def test_what_holds_no_numbers_is_told_before_a_reward_is_blamed(policy: DiffusersPolicy) -> None:
    """A learning rate that was far too large: the sentence names the weights."""
    moved(policy, "current", seed=1, size=1e30)
    with pytest.raises(UserError, match=r"for 'red' is no picture .* lower training.lr"):
        draw(policy)


def test_a_vae_that_gives_no_numbers_is_told(policy: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "decode", lambda latents: torch.full((len(latents), 3, *SIZE), float("nan")))
    with pytest.raises(UserError, match="the VAE gives NaN"):
        draw(policy)
