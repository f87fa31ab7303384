"""Prompts that taught nothing are passed over for a while: in which order, with which floor, and over a resume."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engine import SIZE, quick, write_quick
from processes import train_in
from safetensors.torch import load_file

from dgpo_core.common.distributed import World
from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt, PromptStream
from dgpo_core.method.trainer import Trainer
from dgpo_core.method.turns import PassingOver
from dgpo_core.rewards import Reward

NAMES = "abcdefgh"


def turns(pass_over: int = 2, per_iteration: int = 2, names: str = NAMES) -> PassingOver:
    return PassingOver(PromptStream([Prompt(name) for name in names], per_iteration, seed=3), pass_over)


def played(turns: PassingOver, iterations: int, dull: str = "") -> list[str]:
    """The names that came, where the prompts `dull` never teach anything."""
    came = []
    for _ in range(iterations):
        drawn = turns.next(0)  # it counts its own
        names = [prompt.text for prompt in drawn.prompts]
        turns.take(drawn, {place: name not in dull for place, name in enumerate(names)})
        came += names
    return came


def test_while_all_teach_the_order_is_the_streams() -> None:
    stream = turns().stream
    assert played(turns(), 12) == [prompt.text for i in range(12) for prompt in stream.at(i)]


def test_what_teaches_nothing_comes_once_in_so_many_rounds() -> None:
    counts = Counter(played(turns(pass_over=2), 100, dull="abcd"))
    assert {counts[name] for name in "efgh"} <= {37, 38}
    assert {counts[name] for name in "abcd"} <= {12, 13}  # every third time


def test_what_teaches_again_is_drawn_as_often_as_others() -> None:
    some = turns(pass_over=2)
    played(some, 40, dull="abcd")
    counts = Counter(played(some, 100))
    assert max(counts.values()) - min(counts.values()) <= 3


def test_where_nothing_teaches_all_are_drawn_all_the_same() -> None:
    counts = Counter(played(turns(pass_over=1000), 40, dull=NAMES))
    assert set(counts) == set(NAMES)


def test_no_prompt_comes_twice_in_an_iteration_unless_there_are_too_few() -> None:
    came = played(turns(per_iteration=4), 50, dull="ab")
    assert all(len({*came[i : i + 4]}) == 4 for i in range(0, len(came), 4))
    assert len(played(turns(per_iteration=4, names="ab"), 5, dull="a")) == 20


def test_it_goes_on_from_its_state() -> None:
    whole, stopped, again = turns(), turns(), turns()
    came = played(whole, 30, dull="abc")
    assert played(stopped, 13, dull="abc") == came[:26]
    again.load_state(stopped.state())
    assert played(again, 17, dull="abc") == came[26:]


def test_an_iteration_that_does_not_end_takes_no_turn() -> None:
    some = turns()
    assert some.next(0) == some.next(0)


@pytest.mark.parametrize("state", [None, {}, {"taken": 1, "resting": {"x": 1}}, {"taken": 1, "resting": {"9": 1}}])
def test_a_state_that_is_none_is_told(state: Any) -> None:
    with pytest.raises(UserError, match=r"^The checkpoint (does not say which prompts|is of other prompts)"):
        turns().load_state({"turns": state})


def test_what_is_read_ahead_holds_all_that_comes() -> None:
    for iterations in (1, 3, 5, 20):
        some = turns()
        played(some, 7, dull="abc")
        ahead = {prompt.text for prompt in some.ahead(range(iterations), World("cpu"))}
        assert {*played(some, iterations, dull="abcde")} <= ahead


def test_of_other_prompts_it_is_not_known_what_they_teach() -> None:
    some, others = turns(names="abcd"), turns(names="xabcd")
    played(some, 5, dull="ab")
    assert some.resting
    others.load_state(some.state())
    assert (others.taken, others.resting) == (some.taken, {})
    fewer = turns(names="ab")
    fewer.load_state(some.state())
    assert not fewer.resting


class OneTeaches(Reward):
    """Only pictures of "red" differ."""

    def score(self, images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        return torch.tensor([float(i) if prompt == "red" else 1.0 for i, prompt in enumerate(prompts)])


@pytest.mark.slow
def test_a_training_draws_what_teaches_more_often() -> None:
    config = quick(data={"groups_per_iteration": 1, "pass_over": 3}, reward="any", training={"lr": 1e-3})
    prompts = [Prompt(text) for text in ("red", "blue", "red blue")]
    trainer = Trainer(tiny.shared("sd3"), prompts, {"any": OneTeaches()}, config, size=SIZE)
    came = Counter(trainer.iterate().groups[0].prompt.text for _ in range(12))
    assert came["red"] == 8  # in each of eight rounds; the others in the first and the fifth
    tensors, info = trainer.state()
    other = Trainer(tiny.shared("sd3"), prompts, {"any": OneTeaches()}, config, size=SIZE)
    other.load_state(tensors, info)
    assert other.turns.state() == trainer.turns.state()


@pytest.mark.slow
@pytest.mark.processes
def test_a_resumed_run_ends_as_one_that_was_never_stopped(tmp_path: Path) -> None:
    changes = {"data": {"pass_over": 2}, "iterations": 6, "checkpoint": {"every": 1, "keep": 9}}
    for name in ("whole", "parts"):
        args = write_quick(tmp_path / name, tiny.folder("sd3"), **changes)
        for more in [["--iterations", "3"], ["--resume"]] if name == "parts" else [[]]:
            assert train_in(tmp_path / name, [*args, "--name", "run", *more]) == 0
    whole, parts = (load_file(tmp_path / name / "runs" / "run" / "lora.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
