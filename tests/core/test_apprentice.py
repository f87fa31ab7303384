"""The apprentice: which groups a taste answers beside a person, and that it learns, is watched, and stops asking."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bright_features import MeanColour

from dgpo_core.common.errors import UserError
from dgpo_core.common.group import Group
from dgpo_core.common.prompts import Prompt
from dgpo_core.people.apprentice import FILE, Apprentice
from dgpo_core.people.ask import ask
from dgpo_core.people.gallery import read_gallery
from dgpo_core.people.questions import Answer, Question, Questions
from dgpo_core.rewards.taste.model import Taste

pytestmark = pytest.mark.slow

SIZE, PER_ROUND = 5, 4


class Person(Questions):
    """Prefers red pictures, or (`moody`) says the opposite. asked: the keys that they were asked about, by round."""

    def __init__(self) -> None:
        super().__init__(lambda event, data: None)
        self.moody, self.asked, self.reds = False, list[list[str]](), dict[str, list[float]]()

    def ask(
        self,
        question: Question,
        timeout_s: float,
        check: Callable[[], None],
        save: Callable[[Answer], None] = lambda answer: None,
    ) -> Answer:
        keys = [group.images[0]["filename"].partition("-")[0] for group in question.groups]
        self.asked.append(keys)
        answer = Answer(tuple(self._said(self.reds[key], question.mode) for key in keys))
        save(answer)
        return answer

    def _said(self, reds: list[float], mode: str) -> dict[str, Any]:
        if mode == "pairs":
            better, worse = (1, 0) if (reds[1] > reds[0]) != self.moody else (0, 1)
            return {"pairs": [[better, ">", worse], [2, "?", 3]]}
        order = sorted(range(SIZE), key=reds.__getitem__, reverse=not self.moody)
        return {"ranking": [[i] for i in order]}


class Rounds:
    """Asks about groups of pictures of random colours, round after round, as a run does."""

    def __init__(self, folder: Path, answers: int = 0, audit: float = 0.0, mode: str = "rank") -> None:
        self.folder, self.person, self.mode, self.told = folder, Person(), mode, list[str]()
        self.apprentice = Apprentice(folder, MeanColour(), answers, audit, self.told.append)

    def round(self, k: int, *, equal: bool = False) -> Answer:
        generator = torch.Generator().manual_seed(k)
        colours = torch.rand(PER_ROUND, SIZE, 3, generator=generator)
        groups = [
            Group(
                Prompt(f"prompt {k} {g}"),
                tuple(range(SIZE)),
                torch.zeros(SIZE, 1, 1, 1),
                colours[g, :, :, None, None].expand(SIZE, 3, 8, 8) * (not equal),
            )
            for g in range(PER_ROUND)
        ]
        keys = [f"r{k}g{g}" for g in range(PER_ROUND)]
        self.person.reds |= {key: colours[g, :, 0].tolist() for g, key in enumerate(keys)}
        answer = ask(
            self.person, groups, keys, self.folder, {}, mode=self.mode, pairs=2, timeout_s=0, check=lambda: None,
            apprentice=self.apprentice,
        )  # fmt: skip
        assert answer
        return answer

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "answers.jsonl").read_text().splitlines()]


def right(answer: Answer, k: int) -> float:
    """The share of the round's pairs told apart in which the redder picture has the better score."""
    reds = torch.rand(PER_ROUND, SIZE, 3, generator=torch.Generator().manual_seed(k))[:, :, 0]
    rows = torch.tensor(answer.rows([SIZE] * PER_ROUND))
    apart = (rows[:, :, None] > rows[:, None]).float()
    return ((reds[:, :, None] > reds[:, None]) * apart).sum().item() / apart.sum().item()


def test_it_asks_about_all_at_first_and_then_answers_what_it_is_sure_of(tmp_path: Path) -> None:
    run = Rounds(tmp_path)
    answers = [run.round(k) for k in range(8)]
    assert run.person.asked[0] == [f"r0g{g}" for g in range(PER_ROUND)]
    assert sum(map(len, run.person.asked)) < 20
    assert sum(right(answer, k) for k, answer in enumerate(answers)) / 8 > 0.9
    assert len(run.told) == 1
    assert "The taste answers what it is sure of" in run.told[0]
    assert Taste.load(tmp_path / FILE).groups <= sum(map(len, run.person.asked))


def test_its_answers_are_marked_and_count_as_nobodys(tmp_path: Path) -> None:
    run = Rounds(tmp_path)
    for k in range(6):
        run.round(k)
    asked = {key for keys in run.person.asked for key in keys}
    by = {line["key"]: line.get("by") for line in run.lines()}
    assert len(by) == 6 * PER_ROUND
    assert {key for key, who in by.items() if who is None} == asked
    assert {line["version"] for line in run.lines() if line.get("by")} == {3}
    gallery = read_gallery(tmp_path)
    assert len(gallery.groups) == len(asked)
    assert any("answered by a taste, not by you" in note for note in gallery.notes)
    assert run.apprentice.given == len(asked)


def test_a_run_that_goes_on_decides_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, first = Rounds(tmp_path / "whole", audit=0.3), Rounds(tmp_path / "parts", audit=0.3)
    answers = [whole.round(k) for k in range(7)]
    for k in range(4):
        first.round(k)
    file = tmp_path / "parts" / "answers.jsonl"
    kept = [line for line in file.read_text().splitlines() if '"key": "r3' not in line or '"by": "taste"' in line]
    file.write_text("\n".join(kept) + "\n" + '{"prompt": "torn')  # killed while the person was asked in round 3
    again = Rounds(tmp_path / "parts", audit=0.3)
    assert [again.round(k) for k in range(7)] == answers
    assert again.person.asked == whole.person.asked[-len(again.person.asked) :]
    assert again.round(2) == answers[2]


def test_it_asks_more_while_it_is_often_wrong(tmp_path: Path) -> None:
    run = Rounds(tmp_path, audit=0.2)
    for k in range(10):
        run.round(k)
    before = sum(map(len, run.person.asked))
    run.person.moody = True
    for k in range(10, 20):
        run.round(k)
    after = sum(map(len, run.person.asked)) - before
    assert after > 1.5 * before
    assert any("you are asked about all" in said for said in run.told)


def test_some_of_what_it_is_sure_of_is_asked_all_the_same(tmp_path: Path) -> None:
    never, often = Rounds(tmp_path / "never"), Rounds(tmp_path / "often", audit=0.5)
    for run in (never, often):
        for k in range(20):
            run.round(k)
    few, many = (sum(map(len, run.person.asked[-8:])) for run in (never, often))
    assert few < many
    assert 20 < sum(map(len, often.person.asked)) < 65  # about half of 80


def test_after_the_last_answer_it_goes_on_alone(tmp_path: Path) -> None:
    run = Rounds(tmp_path, answers=10, audit=1.0)
    answers = [run.round(k) for k in range(8)]
    assert sum(map(len, run.person.asked)) == 10
    assert right(answers[-1], 7) > 0.8
    assert run.told[-1].startswith("You have answered your 10 groups; the taste goes on alone")


def test_a_few_wrong_guesses_before_the_last_answer_do_not_stop_the_run(tmp_path: Path) -> None:
    run = Rounds(tmp_path, answers=44, audit=1.0)
    for k in range(10):
        run.round(k)
    run.person.moody = True
    run.round(10)
    assert run.apprentice.given == 44
    assert right(run.round(11), 11) > 0.5


def test_without_a_taste_above_chance_it_does_not_go_on_alone(tmp_path: Path) -> None:
    run = Rounds(tmp_path, answers=4)
    run.round(0, equal=True)  # black pictures: there is nothing to see
    with pytest.raises(UserError, match="is no better than chance: raise human.answers"):
        run.round(1, equal=True)
    assert len(run.lines()) == 4


def test_of_pairs_each_is_an_answer_and_the_group_counts_once(tmp_path: Path) -> None:
    run = Rounds(tmp_path, answers=6, audit=1.0, mode="pairs")
    run.round(0)
    assert run.apprentice.given == 8
    run.round(1)
    assert run.apprentice.given == 12
    assert len(run.lines()) == 8
