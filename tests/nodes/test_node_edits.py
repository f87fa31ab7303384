"""Edits that somebody has: the source is made as its edits are, and who needs one, or cannot use it; no ComfyUI."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from node_files import node_file

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.source import Source
from dgpo_core.settings.config import LoraConfig, MemoryConfig, ModelConfig, RewardTerm, RolloutConfig

edits, keys, values = node_file("runs.edits"), node_file("runs.keys"), node_file("common.values")
sheets = node_file("common.contact_sheet")
HANDLE = values.PolicyHandle(values.PolicySpec("run", 0, ModelConfig(), LoraConfig(), MemoryConfig()), 0, "root")
SAMPLER = values.Sampler(RolloutConfig())
SIZE = (tiny.SIZE, tiny.SIZE)
KEY_BEFORE = "28da9ef1b671b9ee"  # by commit 0c93603


def noise(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def asked(source: torch.Tensor | None) -> Prompt:
    return Prompt("make it red", sources=() if source is None else (Source.of_pixels(source),))


def group(source: torch.Tensor | None) -> Group:
    return Group(asked(source), (0, 1), torch.zeros(2, 1, 1, 1), torch.zeros(2, 3, 8, 8))


def cropped(pictures: torch.Tensor) -> torch.Tensor:
    """The middle of pictures [B, 3, 8, 12]."""
    return pictures[..., 2:10].contiguous()


def test_a_source_is_cropped_and_scaled_as_its_edits_are() -> None:
    images = noise(2, 3, 8, 12)
    prompt, pictures = edits.fitted(asked(images[1]), images, cropped)
    assert torch.equal(pictures, cropped(images))
    assert torch.equal(prompt.sources[0].image(), pictures[1])
    assert prompt.text == "make it red"


def test_a_larger_source_is_brought_to_the_size_of_its_edits_first() -> None:
    flat = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 16, 24)
    prompt, pictures = edits.fitted(asked(flat), noise(2, 3, 8, 12), cropped)
    assert torch.equal(prompt.sources[0].image(), flat[:, :8, :8])
    assert len(pictures) == 2


def test_images_without_a_source_are_as_they_were() -> None:
    images = noise(2, 3, 8, 12)
    prompt, pictures = edits.fitted(asked(None), images, cropped)
    assert prompt == asked(None)
    assert torch.equal(pictures, cropped(images))


def test_a_source_of_other_proportions_is_refused_with_both_sizes() -> None:
    with pytest.raises(UserError, match=r'^The "picture before the edit" \(source\) is 12 x 12 pixels, .* 12 x 8: '):
        edits.fitted(asked(noise(3, 12, 12)), noise(2, 3, 8, 12), cropped)


def test_a_group_of_pictures_has_the_key_that_it_had_and_each_source_another() -> None:
    found = [keys.given(HANDLE, group(source), SAMPLER) for source in (None, noise(3, 8, 8), noise(3, 8, 8, seed=1))]
    assert found[0] == KEY_BEFORE
    assert len(set(found)) == 3


def test_the_picture_on_a_node_shows_the_source_before_the_best_and_the_worst() -> None:
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 8, 8)
    plain, sheet = (
        sheets.close_up(values.Groups((replace(group(source), scores={}),), HANDLE, SAMPLER, 0, "key"))
        for source in (None, red)
    )
    tile = sheet.width - plain.width
    assert tile == sheets.CLOSE_TILE + sheets.CLOSE_GAP
    assert [sheet.getpixel((place * tile + tile // 2, sheet.height // 2)) for place in range(3)] == [
        (255, 0, 0),
        (0, 0, 0),
        (0, 0, 0),
    ]


def test_a_model_that_always_edits_asks_for_a_source_and_others_do_not() -> None:
    with pytest.raises(UserError, match=r"^A model of the family kontext edits pictures: connect the one"):
        edits.require_source(tiny.shared("kontext"), asked(None))
    edits.require_source(tiny.shared("kontext"), asked(noise(3, 8, 8)))
    edits.require_source(tiny.shared("sd3"), asked(None))
    edits.require_source(tiny.shared("flux2"), asked(None))


def test_edits_are_learned_by_a_model_that_edits_and_by_no_other() -> None:
    of_edits = [replace(group(None), prompt=asked(noise(3, *SIZE)))]
    with pytest.raises(UserError, match=r"family sd3 draws from text alone: train one that edits .*FLUX\.1 Kontext"):
        edits.require_editor(tiny.shared("sd3"), of_edits, SIZE)
    edits.require_editor(tiny.shared("kontext"), of_edits, SIZE)
    edits.require_editor(tiny.shared("sd3"), [group(None)], SIZE)
    with pytest.raises(UserError, match="trained on prompts that all bring as many"):
        edits.require_editor(tiny.shared("flux2"), [*of_edits, group(None)], SIZE)


@pytest.mark.parametrize("rewards", [["similarity"], ["brightness", "clip_direction"]])
def test_a_reward_that_compares_with_the_source_asks_for_it_by_the_names_on_the_screen(rewards: list[str]) -> None:
    terms = [RewardTerm(name) for name in rewards]
    with pytest.raises(UserError, match=f"^The reward {rewards[-1]} compares with .* 'make it red' has none: ") as told:
        edits.require_sources(terms, [group(noise(3, 8, 8)), group(None)])
    assert '"picture before the edit" (source) of Group from Images' in str(told.value)
    assert '"pictures to edit" (images) of Prompts' in str(told.value)
    edits.require_sources(terms, [group(noise(3, 8, 8))])


def test_a_reward_that_looks_at_the_result_alone_asks_for_no_source() -> None:
    edits.require_sources([RewardTerm("brightness")], [group(None)])
