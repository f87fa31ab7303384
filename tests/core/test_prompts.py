import json
import time
from collections import Counter
from pathlib import Path

import pytest

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt, PromptStream, load_prompts, read_prompts

ORDER = [["4", "0", "3"], ["2", "1", "1"], ["3", "0", "4"], ["4", "2", "3"]]  # as the first version had it


def test_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# a comment\r\na red circle\r\n\r\n  two blue squares  \nein grüner Kreis".encode())
    assert [prompt.text for prompt in load_prompts(path)] == ["a red circle", "two blue squares", "ein grüner Kreis"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_text_has_the_same_lines_in_a_file_and_in_a_box(tmp_path: Path, end: str) -> None:
    text = f"a red\u2028circle{end}{end}two\u0085blue squares{end}"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    found = load_prompts(tmp_path / "prompts.txt")
    assert [prompt.text for prompt in found] == ["a red\u2028circle", "two\u0085blue squares"]
    assert found == read_prompts(text)
    assert [prompt.where[-1] for prompt in found] == ["1", "3"]


def test_jsonl_keeps_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "prompts.JSONL"
    path.write_text('{"prompt": "one\u2028line", "tag": "counting", "include": [{"count": 2}]}\n\n{"prompt": "b"}\n')
    assert load_prompts(path) == [
        Prompt("one\u2028line", {"tag": "counting", "include": [{"count": 2}]}),
        Prompt("b", {}),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a red', "not valid JSON"),
        ('["a red circle"]', "must be an object"),
        ('{"text": "a red circle"}', '"prompt" must be there'),
        ('{"prompt": 3}', '"prompt" must be there'),
        ('{"prompt": "  "}', '"prompt" must be there'),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "fine"}) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(path)
    assert f"{path}:3:" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.txt", b"", "has no prompts"),
        ("prompts.txt", b"# only a comment\n\n", "has no prompts"),
        ("prompts.jsonl", b"\n\n", "has no prompts"),
        ("prompts.csv", b"a red circle", "must be a .txt or .jsonl"),
        ("prompts.txt", b"fine\na r\xe9d circle", "prompts.txt:2: not UTF-8"),
        ("prompts.txt", None, "There is no prompt file"),
    ],
)
def test_unusable_file_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_prompts(tmp_path / name)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").mkdir()
    with pytest.raises(UserError, match="is a folder|cannot be read"):
        load_prompts(tmp_path / "prompts.txt")


def test_stream_gives_each_prompt_once_per_round() -> None:
    prompts = [Prompt(str(number)) for number in range(10)]
    stream = PromptStream(prompts, per_iteration=4, seed=7)
    drawn = [prompt.text for iteration in range(5) for prompt in stream.at(iteration)]
    first, second = drawn[:10], drawn[10:]
    assert sorted(first) == sorted(second) == [prompt.text for prompt in prompts]
    assert first != second


def test_stream_depends_on_nothing_but_the_iteration() -> None:
    prompts = [Prompt(str(number)) for number in range(10)]
    stream = PromptStream(prompts, per_iteration=3, seed=7)
    forwards = [stream.at(iteration) for iteration in range(20)]
    assert [stream.at(iteration) for iteration in reversed(range(20))] == forwards[::-1]
    assert PromptStream(prompts, 3, seed=7).at(13) == forwards[13]
    assert [PromptStream(prompts, 3, seed=8).at(iteration) for iteration in range(20)] != forwards


def test_stream_takes_more_prompts_than_there_are() -> None:
    prompts = [Prompt("a"), Prompt("b"), Prompt("c")]
    assert Counter(prompt.text for prompt in PromptStream(prompts, 9, seed=0).at(0)) == {"a": 3, "b": 3, "c": 3}


@pytest.mark.slow
def test_planning_an_iteration_does_not_cost_more_where_there_are_more_prompts() -> None:
    """A loop of the nodes makes the stream anew for each of a thousand iterations that it looks ahead."""

    def seconds(count: int) -> float:
        prompts = tuple(Prompt(f"prompt {i}") for i in range(count))
        PromptStream(prompts, 8, count).at(0)  # the order of a round is made once
        start = time.perf_counter()
        for iteration in range(1000):
            PromptStream(prompts, 8, count).at(iteration % (count // 8))
        return time.perf_counter() - start

    assert seconds(100_000) < 5 * seconds(100) + 0.2


def test_the_order_is_the_one_that_it_always_was() -> None:
    stream = PromptStream([Prompt(str(i)) for i in range(5)], 3, seed=7)
    assert [[prompt.text for prompt in stream.at(i)] for i in (0, 1, 2, 1000)] == ORDER
