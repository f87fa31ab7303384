"""The file that keeps what people said: what is read back from it, and what a crash or another hand did to it."""

import json
from pathlib import Path
from typing import Any

import pytest

from dgpo_core.common.errors import UserError
from dgpo_core.people.preference_file import AnswerFile, Preference, read_preferences


def said(key: str, thumbs: list[int], prompt: str = "a fox") -> Preference:
    return Preference(prompt, tuple(f"{i}.png" for i in range(len(thumbs))), {"thumbs": thumbs}, key)


def thumbs(file: AnswerFile, key: str, size: int = 2) -> Any:
    """What the file holds under a key; None for nothing."""
    found = file.get([key], [size])
    return found and found[0].answer["thumbs"]


def test_the_file_gives_back_the_newest_answer_of_a_key(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "new" / "answers.jsonl")
    assert thumbs(file, "a") is None
    for key, given in (("a", [1, 0]), ("b", [0, 1]), ("a", [0, -1])):
        file.put([said(key, given)])
    assert thumbs(file, "a") == [0, -1]
    assert thumbs(file, "b") == [0, 1]
    assert thumbs(file, "c") is None
    assert thumbs(file, "a", 3) is None  # of other groups


def test_a_question_is_answered_only_where_all_of_its_groups_are(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    file.put([said("a", [1, 0])])
    assert file.get(["a", "b"], [2, 2]) is None
    file.put([said("b", [1, 1, 0])])
    assert [p.key for p in file.get(["b", "a"], [3, 2])] == ["b", "a"]


def test_a_line_that_a_crash_cut_short_costs_only_itself(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    file.put([said("a", [1, 0], "ein Füchslein")])
    whole = file.path.read_bytes()
    for cut in (1, len(whole) // 2, whole.index("ü".encode()) + 1, len(whole) - 1):
        file.path.write_bytes(whole + whole.replace(b'"a"', b'"b"')[:cut])
        assert thumbs(file, "a") == [1, 0]
        file.put([said("c", [0, 1])])
        assert thumbs(file, "a") == [1, 0]
        assert thumbs(file, "c") == [0, 1]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0c"])
def test_a_prompt_may_hold_what_other_programs_take_for_the_end_of_a_line(tmp_path: Path, mark: str) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    file.put([said("a", [1, 0], f"a fox{mark}asleep"), said("b", [0, 1])])
    assert (thumbs(file, "a"), thumbs(file, "b")) == ([1, 0], [0, 1])
    assert [one.prompt for one in file.all()] == [f"a fox{mark}asleep", "a fox"]
    assert [one.prompt for one in read_preferences(file.path)] == [f"a fox{mark}asleep", "a fox"]


@pytest.mark.parametrize("line", ["[]", "3", "null", '{"key": "a"}', '{"key": "a", "images": ["x"]}', "\x00\x00", "é"])
def test_lines_of_others_do_not_count(tmp_path: Path, line: str) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    file.path.write_bytes(line.encode("latin-1") + b"\n")
    assert thumbs(file, "a") is None
    file.put([said("a", [1, 0])])
    assert thumbs(file, "a") == [1, 0]


def test_a_file_written_by_hand_holds_rankings_ratings_thumbs_and_skips(tmp_path: Path) -> None:
    path = tmp_path / "preferences.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": "a fox", "images": ["a", "b", "c"], "ranking": [[2], [0, 1]]},
        {"prompt": "a fox", "images": ["a", "b", "c"], "ranking": [[2], [0]]},  # best and worst alone
        {"images": ["a", "b", "c"], "ratings": [5, None, 2.5], "artist": "me"},
        {"prompt": "a fox", "images": ["a", "b"], "thumbs": [1, -1]},
        {"prompt": "a fox", "images": ["a", "b"], "skip": True},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8-sig")
    found = read_preferences(path)
    assert [p.scores() for p in found] == [[-0.5, -0.5, 1.0], [-1.0, 0.0, 1.0], [5.0, 3.75, 2.5], [1.0, -1.0], None]
    assert [p.prompt for p in found] == ["a fox", "a fox", "", "a fox", "a fox"]


def test_a_line_with_a_version_says_what_rankings_mean_today(tmp_path: Path) -> None:
    images = ["a", "b", "c", "d"]
    rankings: list[dict[str, Any]] = [
        {"ranking": [[2], [0]]},
        {"ranking": [[2], [0]], "version": 1},
        {"ranking": [[2], [0]], "version": 2},
        {"ranking": [[2]], "worst": [0], "version": 2},
        {"pairs": [[2, ">", 0], [1, "?", 3]], "version": 2},
    ]
    path = tmp_path / "preferences.jsonl"
    path.write_text("\n".join(json.dumps({"images": images, **ranking}) for ranking in rankings))
    old, first, *new, pairs = [p.scores() for p in read_preferences(path)]
    assert old == first == [-1, 0, 1, 0]
    assert new == [[pytest.approx(x) for x in row] for row in ([1 / 3, -2 / 3, 1, -2 / 3], [-1, 0, 1, 0])]
    assert pairs[2] == -pairs[0] > 0 == pairs[1] == pairs[3]


def test_an_answer_of_an_earlier_version_keeps_its_scores_when_it_is_written_again(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    file.path.write_text('{"prompt": "", "images": ["a", "b", "c"], "ranking": [[1]], "key": "k", "time": 1}\n')
    (before,) = file.get(["k"], [3])
    file.put([before])
    (after,) = file.get(["k"], [3])
    assert before.scores() == after.scores() == [0, 1, 0]


@pytest.mark.parametrize(
    "answer",
    [{"ranking": [[1]]}, {"ranking": [], "worst": [0]}, {"pairs": [[0, ">", 1], [1, "?", 2]]}, {"thumbs": [1, 0, -1]}],
)
def test_what_is_kept_is_read_back_as_it_was_said(tmp_path: Path, answer: dict[str, Any]) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    said = Preference("a fox", ("a", "b", "c"), answer, "k")
    file.put([said])
    assert file.get(["k"], [3]) == read_preferences(file.path) == [said]


def test_a_file_of_answers_is_a_preference_file_in_which_the_last_answer_counts(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    for key, given in (("a", [1, 0]), ("b", [0, 1]), ("a", [0, 1])):
        file.put([said(key, given)])
    assert sorted((p.key, p.scores()) for p in read_preferences(file.path)) == [("a", [0.0, 1.0]), ("b", [0.0, 1.0])]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be an object"),
        ('{"ratings": [1, 2]}', '"images" must be a list'),
        ('{"images": [], "skip": true}', '"images" must be a list'),
        ('{"images": ["a", 3], "ratings": [1, 2]}', '"images" must be a list'),
        ('{"images": ["a", "b"]}', "The answer about a group must be"),
        ('{"images": ["a", "b"], "ratings": [1, 2], "thumbs": [0, 1]}', "The answer about a group must be"),
        ('{"images": ["a", "b"], "ratings": [1]}', "each of the 2 images"),
        ('{"images": ["a", "b"], "ratings": [1, "2"]}', "A rating must be a number"),
        ('{"images": ["a", "b"], "ratings": [1, NaN]}', "A rating must be a number"),
        ('{"images": ["a", "b"], "ratings": [1, true]}', "A rating must be a number"),
        ('{"images": ["a", "b"], "ranking": [[0], [2]]}', "names image 2"),
        ('{"images": ["a", "b"], "ratings": [1, 2], "prompt": 3}', '"prompt" must be a text'),
        ('{"images": ["a", "b"], "ratings": [1, 2], "version": 3}', '"version" must be 2 or left out, not 3'),
        ('{"images": ["a", "b"], "ratings": [1, 2], "version": "2"}', '"version" must be 2 or left out'),
        ('{"images": ["a", "b"], "ranking": [[0]], "worst": [1]}', '"worst" needs "version": 2'),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "preferences.jsonl"
    path.write_text('{"images": ["a", "b"], "skip": true}\n' + line + "\n")
    with pytest.raises(UserError, match=sentence) as error:
        read_preferences(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert str(error.value).endswith(".")
