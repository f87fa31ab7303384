"""Files that somebody else wrote: damaged, endless or made to do harm, each ends in one sentence."""

import contextlib
import os
from pathlib import Path

import pytest

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import parse_json, parse_yaml, read_bytes, read_json, read_text, shown

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

JSON = {
    "nested too deeply": "[" * 100_000,
    "nested more than 64": "[" * 80 + "]" * 80,
    "not valid JSON": '{"a": }',
    "digits": "[" + "9" * 5000 + "]",
    "whole number of 401 digits": "[1" + "0" * 400 + "]",
    "lone surrogate": '["\\ud800"]',
    "lone": '{"\\udfff": 1}',
}

YAML = {
    "stands for more than": BOMB,
    "levels deep": "a: &a\n  b: *a\n",
    "given twice": "name: a\nname: b\n",
    "in line 2": "a: 1\nb: }\n",
    "not valid YAML": "a: !!python/object/apply:os.system [echo]\n",
    "digits": "a: " + "9" * 5000,
    "nested": "[" * 5000,
    "lone surrogate": 'a: "\\ud800"',
}


@pytest.mark.parametrize("problem", JSON)
def test_harmful_json_is_refused_in_one_sentence(problem: str) -> None:
    with pytest.raises(UserError, match="The file a.json") as refused:
        parse_json(JSON[problem], "The file a.json")
    assert problem.split()[0] in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("problem", YAML)
def test_harmful_yaml_is_refused_in_one_sentence(problem: str) -> None:
    with pytest.raises(UserError, match=problem) as refused:
        parse_yaml(YAML[problem], "The file a.yaml")
    assert "\n" not in str(refused.value)


def test_a_date_in_yaml_is_the_text_that_stands_there() -> None:
    assert parse_yaml("name: 2026-11-27", "The file") == {"name": "2026-11-27"}


def test_anchors_and_merge_keys_of_yaml_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}", "The file")["b"] == {"x": 1, "y": 2}


def test_a_mapping_that_is_merged_into_another_is_not_taken_for_one_with_a_key_twice() -> None:
    assert parse_yaml("a: &a {x: 1}\np: {q: &b {<<: *a, x: 2}}\nc: {<<: *b}", "The file")["p"] == {"q": {"x": 2}}


def test_merge_keys_that_stand_for_billions_are_read_once_or_refused() -> None:
    """PyYAML since 6.0.3 brings in a key once; before it, each of 9^29 times."""
    lines = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 30))]
    with contextlib.suppress(UserError):
        assert parse_yaml("\n".join(lines), "The file")["a29"] == {"x": 1}


@pytest.mark.parametrize(
    "text", ["a: !!binary aGk=", "a: !!set {b, c}", "a: !!timestamp soon", 'a: !!int ""', "a: !!bool b", "a: !!omap x"]
)
def test_tags_of_yaml_bring_in_nothing_but_plain_values(text: str) -> None:
    with pytest.raises(UserError, match="^The file (is not valid YAML|cannot be read)"):
        parse_yaml(text, "The file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="There are no named pipes on this system.")
def test_a_named_pipe_is_refused_and_not_waited_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="no ordinary file"):
        read_json(tmp_path / "pipe.json", "The file")


def test_what_is_missing_a_folder_too_large_or_not_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "utf16.txt").write_text("Grüße", encoding="utf-16")
    (tmp_path / "large.txt").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(UserError, match="does not exist"):
        read_text(tmp_path / "none.txt", "The file")
    with pytest.raises(UserError, match="a folder"):
        read_text(tmp_path, "The file")
    with pytest.raises(UserError, match="more than 1 MB"):
        read_bytes(tmp_path / "large.txt", "The file", most=2**20)
    with pytest.raises(UserError, match="save it as UTF-8"):
        read_text(tmp_path / "utf16.txt", "The file")
    with pytest.raises(UserError, match="cannot be read"):
        read_text("a\0b", "The file")


def test_a_text_from_outside_cannot_move_a_terminals_cursor() -> None:
    assert shown("a\x1b[2Jb\nc\u202ed\ud800") == "a\\x1b[2Jb\\nc\\u202ed\\ud800"
    assert shown("é 画 🦊") == "é 画 🦊"
    assert len(shown("x" * 1000)) == 200


def test_any_log_can_write_an_error() -> None:
    error = UserError("There is no layer \ud800é.")
    assert str(error).encode() == "There is no layer \\ud800é.".encode()
