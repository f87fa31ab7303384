"""What `dgpo_core.evaluate` tells by kind of prompt: the mean of each tag, in the terminal, the report and the file."""

import pytest
import torch

from dgpo_core.common.prompts import Prompt
from dgpo_core.evaluation.by_tag import tags_of
from dgpo_core.evaluation.report import Column, Table, markdown
from dgpo_core.evaluation.scores import Evaluation
from dgpo_core.settings.config import Config

RIGHT = Column("right", {"right": 1.0})


def evaluation(*scores: float) -> Evaluation:
    """Of three prompts, the first of which has two images."""
    places = torch.tensor([(0, 0), (0, 1), (1, 0), (2, 0)])
    return Evaluation(0, places, {"right": torch.tensor(scores)})


def table(*tags: str) -> Table:
    return Table([RIGHT], {"base": evaluation(0, 1, 0, 1), "mine": evaluation(1, 1, 0, 1)}, tags)


def test_a_prompts_tag_is_told_where_all_have_one_and_they_differ() -> None:
    def prompts(*tags: object) -> list[Prompt]:
        return [Prompt("x", {} if tag is None else {"tag": tag}) for tag in tags]

    assert tags_of(prompts("two", "one", "two")) == ["two", "one", "two"]
    for silent in (prompts("one", "one"), prompts("one", None), prompts("one", ""), []):
        assert tags_of(silent) == []


def test_the_mean_of_a_tag_is_over_its_images_and_that_of_the_tags_counts_each_once() -> None:
    found = table("one", "two", "one").by_tag(RIGHT)
    assert found.cells(str) == [
        ["", "one", "two", "mean of these"],
        ["base", "0.667", "0.000", "0.333"],
        ["mine", "1.000", "0.000", "0.500"],
    ]
    assert found.means["base"]["one"].n == 3


def test_it_stands_below_the_reward_with_its_columns_in_line() -> None:
    lines = str(table("one", "two", "one")).splitlines()
    assert lines[5:] == [
        "          one      two  mean of these",
        "base    0.667    0.000          0.333",
        "mine    1.000    0.000          0.500",
    ]


def test_without_tags_nothing_is_said_of_them() -> None:
    bare = table()
    assert len(str(bare).splitlines()) == 4
    assert "mean of these" not in markdown(bare, Config())
    assert "tags" not in bare.as_json()[0]


def test_the_file_has_the_interval_of_each_tag() -> None:
    (base, _) = table("one", "two", "one").as_json()
    assert base["tags"]["one"]["mean"] == pytest.approx(2 / 3)
    assert base["tags"]["two"] == {"mean": 0.0, "ci95": [0.0, 0.0], "n": 1}


def test_a_tag_from_outside_does_nothing_in_the_report_or_the_terminal() -> None:
    odd = table("<b>|x", "\x1b[2J", "<b>|x")
    assert "| &lt;b&gt;\\|x |" in markdown(odd, Config())
    assert "\x1b" not in str(odd)
