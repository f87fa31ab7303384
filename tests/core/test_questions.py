"""Asking and answering across threads, and the file of the answers; no ComfyUI."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgpo_core.common.errors import UserError
from dgpo_core.method.rollout import nothing
from dgpo_core.people import questions
from dgpo_core.people.preference_file import AnswerFile

RANKED = {"groups": [{"ranking": [[1], [0]]}, {"skip": True}]}


class Interrupted(BaseException):
    """As ComfyUI's: no Exception."""


class Asker(threading.Thread):
    """Asks in a thread of its own; what came of it is in `answer` or `error`."""

    def __init__(
        self, registry: Any, question: Any, timeout_s: float = 0, check: Callable[[], None] = nothing, **more: Any
    ):
        super().__init__(daemon=True)
        self.question, self._ask = question, lambda: registry.ask(question, timeout_s, check, **more)
        self.answer = self.error = None
        self.start()
        _until(lambda: any(q["token"] == question.token for q in registry.pending()))

    def run(self) -> None:
        try:
            self.answer = self._ask()
        except BaseException as error:
            self.error = error


@pytest.fixture
def events() -> list[tuple[str, dict[str, Any]]]:
    return []


@pytest.fixture
def registry(events: list[tuple[str, dict[str, Any]]]) -> Any:
    return questions.Questions(lambda event, data: events.append((event, dict(data))))


def a_question(node: str = "5", sizes: tuple[int, ...] = (2, 3), **more: Any) -> Any:
    groups = tuple(
        questions.AskedGroup(f"prompt {g}", tuple({"filename": f"{g}-{i}.png"} for i in range(size)))
        for g, size in enumerate(sizes)
    )
    return questions.Question({"prompt_id": "prompt-id", "node_id": node}, groups, **more)


def _until(done: Callable[[], Any]) -> None:
    end = time.monotonic() + 5
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_answer_reaches_who_asked(registry: Any, events: list[Any]) -> None:
    asker = Asker(registry, a_question())
    registry.answer(asker.question.token, {"token": asker.question.token, **RANKED})
    asker.join(5)
    assert asker.answer.scores([2, 3]) == [[-1.0, 1.0], None]
    assert registry.pending() == []
    assert [event for event, _ in events] == ["dgpo.question", "dgpo.question_closed"]
    assert events[1][1] == {**asker.question.key, "outcome": "answered"}


def test_what_is_pending_is_json(registry: Any, events: list[Any]) -> None:
    asker = Asker(registry, a_question(mode="thumbs"), timeout_s=100)
    (found,) = json.loads(json.dumps(registry.pending()))
    assert found["token"] == asker.question.token
    assert (found["prompt_id"], found["node_id"], found["mode"]) == ("prompt-id", "5", "thumbs")
    assert 90 < found["seconds_left"] <= 100
    assert found["groups"][1]["prompt"] == "prompt 1"
    assert [image["filename"] for image in found["groups"][1]["images"]] == ["1-0.png", "1-1.png", "1-2.png"]
    assert events[0][1].keys() == found.keys()


def test_without_a_timeout_there_is_no_end(registry: Any) -> None:
    Asker(registry, a_question())
    assert registry.pending()[0]["seconds_left"] is None


def test_time_runs_out(registry: Any, events: list[Any]) -> None:
    start = time.monotonic()
    assert registry.ask(a_question(), 0.3, nothing) is None
    assert 0.3 <= time.monotonic() - start < 2
    assert registry.pending() == []
    assert events[-1][1]["outcome"] == "timeout"


def test_an_interrupt_ends_the_wait(registry: Any, events: list[Any]) -> None:
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Interrupted

    asker = Asker(registry, a_question(), check=check)
    stop.set()
    asker.join(1)
    assert isinstance(asker.error, Interrupted)
    assert registry.pending() == []
    assert events[-1][1]["outcome"] == "cancelled"


def test_what_ends_the_wait_may_have_a_name_of_its_own_for_it(registry: Any, events: list[Any]) -> None:
    class Finished(Exception):
        outcome = "finished"

    def check() -> None:
        raise Finished

    asker = Asker(registry, a_question(), check=check)
    asker.join(2)
    assert isinstance(asker.error, Finished)
    assert events[-1][1]["outcome"] == "finished"


def test_two_questions_do_not_mix(registry: Any) -> None:
    first, second = Asker(registry, a_question("5")), Asker(registry, a_question("6"))
    assert [q["node_id"] for q in registry.pending()] == ["5", "6"]
    registry.answer(second.question.token, {"groups": [{"thumbs": [1, 0]}, {"skip": True}]})
    second.join(5)
    assert second.answer.groups[0] == {"thumbs": [1, 0]}
    assert first.is_alive()
    assert [q["node_id"] for q in registry.pending()] == ["5"]
    registry.answer(first.question.token, RANKED)
    first.join(5)
    assert first.answer.groups[0] == {"ranking": [[1], [0]]}


def test_the_first_answer_counts(registry: Any) -> None:
    asker = Asker(registry, a_question())
    registry.answer(asker.question.token, RANKED)
    with pytest.raises(questions.UnknownQuestion, match="not open"):
        registry.answer(asker.question.token, {"groups": [{"skip": True}, {"skip": True}]})
    asker.join(5)
    assert asker.answer.groups[0] == {"ranking": [[1], [0]]}


def test_which_pair_comes_next_is_said_while_the_question_is_open(registry: Any) -> None:
    asker = Asker(registry, a_question(mode="pairs", pairs=2))
    token = asker.question.token
    assert [group["pairs"] for group in registry.pending()[0]["groups"]] == [1, 2]
    first = registry.next(token, {"group": 1, "pairs": []})
    left, right = first["pair"]
    assert first["scores"] == [0, 0, 0]
    said = [[left, ">", right]]
    second = registry.next(token, {"group": 1, "pairs": said})
    assert second["scores"][left] > 0 > second["scores"][right]
    said.append([second["pair"][0], "?", second["pair"][1]])
    assert registry.next(token, {"group": 1, "pairs": said})["pair"] is None
    registry.answer(token, {"groups": [{"skip": True}, {"pairs": said}]})
    asker.join(5)
    assert asker.answer.rows([2, 3])[1] == second["scores"]
    with pytest.raises(questions.UnknownQuestion, match="not open"):
        registry.next(token, {"group": 1, "pairs": []})


def test_an_unknown_token(registry: Any) -> None:
    with pytest.raises(questions.UnknownQuestion, match="not open"):
        registry.answer("nobody", RANKED)


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (None, "must be an object"),
        ([], "must be an object"),
        ({}, '"groups" must be a list'),
        ({"groups": []}, "each of the 2 groups"),
        ({"groups": {"0": {"skip": True}}}, "each of the 2 groups"),
        ({"groups": [{"skip": True}]}, "each of the 2 groups"),
        ({"groups": [{"skip": True}, {"ranking": [[0], [3]]}]}, "images 0 to 2"),
        ({"groups": [{"thumbs": [1]}, {"skip": True}]}, "each of the 2 images"),
        ({"token": "another", **RANKED}, "not that of the address"),
    ],
)
def test_a_malformed_answer_leaves_the_question_open(registry: Any, payload: Any, sentence: str) -> None:
    asker = Asker(registry, a_question())
    with pytest.raises(UserError, match=sentence) as error:
        registry.answer(asker.question.token, payload)
    assert not isinstance(error.value, questions.UnknownQuestion)
    assert len(registry.pending()) == 1
    registry.answer(asker.question.token, RANKED)
    asker.join(5)
    assert asker.answer is not None


def test_an_answer_is_saved_before_it_is_used(registry: Any, tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "run" / "answers.jsonl")
    question = a_question()
    seen = []

    def save(answer: Any) -> None:
        seen.append(asker.is_alive())
        file.put(answer.preferences(question.groups, ["a", "b"]))

    asker = Asker(registry, question, save=save)
    registry.answer(asker.question.token, RANKED)
    asker.join(5)
    assert seen == [True]
    found = file.get(["a", "b"], [2, 3])
    assert tuple(preference.answer for preference in found) == asker.answer.groups
    assert [(preference.prompt, preference.images) for preference in found] == [
        ("prompt 0", ("0-0.png", "0-1.png")),
        ("prompt 1", ("1-0.png", "1-1.png", "1-2.png")),
    ]


def test_an_answer_that_cannot_be_saved_is_not_taken(registry: Any, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where a folder should be")
    file, question = AnswerFile(tmp_path / "run" / "answers.jsonl"), a_question()
    asker = Asker(registry, question, save=lambda answer: file.put(answer.preferences(question.groups, ["a", "b"])))
    with pytest.raises(UserError, match="Cannot write .*answers.jsonl"):
        registry.answer(asker.question.token, RANKED)
    assert asker.is_alive()
    assert len(registry.pending()) == 1
