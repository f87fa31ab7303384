"""Tensors without storage answer with their numbers, where these are whole and known."""

import torch
from torch import Tensor

from dgpo_core.benchmark.weightless import Answers, numbers_kept


def on_meta(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, device="meta")


def test_numbers_that_were_known_are_known_after_what_is_done_to_them() -> None:
    with numbers_kept(), Answers():
        grid = on_meta([1, 4, 6])
        assert grid.is_meta
        assert (grid[1:] * 2).tolist() == [8, 12]
        assert grid.prod().item() == 24
        assert torch.repeat_interleave(grid, grid).shape == (11,)
        assert torch.arange(3, device="meta").tolist() == [0, 1, 2]
        assert torch.unique_consecutive(on_meta([0, 0, 5])).tolist() == [0, 5]


def test_what_is_written_into_a_view_is_known_of_the_whole() -> None:
    with numbers_kept(), Answers():
        places = torch.zeros(2, 3, dtype=torch.int64, device="meta")
        places[1] = on_meta([7, 8, 9])
        places[0, 1] += 4
        assert places.tolist() == [[0, 4, 0], [7, 8, 9]]


def test_a_mask_picks_as_many_rows_as_it_has_even_of_numbers_that_nobody_knows() -> None:
    with numbers_kept(), Answers():
        mask = on_meta([1, 0, 1, 1]).bool()
        assert torch.empty(4, 2, device="meta")[mask].shape == (3, 2)
        assert not bool(mask.all())


def test_nothing_is_made_up_once_unknown_numbers_are_in_it() -> None:
    with numbers_kept(), Answers() as answers:
        unknown = torch.empty(3, device="meta") > 0
        mixed = on_meta([1, 2, 3])
        mixed[unknown] = 0
        assert answers.numbers.of(unknown) is None
        assert answers.numbers.of(mixed) is None
        assert mixed.sum().item() == 1  # as any number that is asked for


def test_numbers_are_forgotten_with_the_tensor() -> None:
    with numbers_kept(), Answers() as answers:
        for _ in range(3):
            on_meta([1, 2])
        assert not answers.numbers._beside
