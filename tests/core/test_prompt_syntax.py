"""What other programs interpret in prompts is told once, before the first image, and nothing else is."""

from pathlib import Path

import pytest
from engine import write_quick

from dgpo_core import train
from dgpo_core.common.errors import UserError
from dgpo_core.common.prompt_syntax import SYNTAXES, is_infotext_line, syntax_warning
from dgpo_core.common.prompts import Prompt, load_prompts, read_prompts, refuse_foreign

CASES = Path(__file__).parents[1] / "cases" / "prompt_files"


def found(text: str) -> str:
    return syntax_warning([Prompt(text)])


@pytest.mark.parametrize(
    "text",
    ["a (word:1.2)", "(word:1)", "((x))", "(((x)))", "(x)1.2", "(a fox)++", "[x]", "a [fog] lake", "[a:b:0.5]", "[a|b]",
     "<lora:a:1>", "<LORA:a>", "<hypernet:a:1>", "<wildcard>", "<cat-toy>", "a BREAK b", "a AND b", "{a|b}",
     "{2$$a|b|c}", "{a|{b|c}}", "__x__", "__colors/blue__", "embedding:easynegative", "a cat --ar 16:9"],
)  # fmt: skip
def test_syntax_is_told(text: str) -> None:
    assert found(text)


@pytest.mark.parametrize(
    "text",
    ["a dog :)", "(a dog)", "a (big (brown)) dog", "f(x) = x", "the file __init__.py", "__main__", '{"a": 1}', "a {b}",
     "(cat :3)", "(16:9) poster", "at (10:30)", "(see: a dog)", "(left: 2 dogs)", "list[x]", "[1]", '["a"]', "I <3 you",
     "5 < 6 > 3", 'a sign "BREAK" here', 'a sign that says "STOP AND GO"', "STOP AND GO", "rock-AND-roll", "a -- b",
     "snake_case_name", "_ __ _", "<>", "x<y>z", "((", "{|", r"a smile \(word:1.2\)"],
)  # fmt: skip
def test_what_people_write_as_a_text_is_not(text: str) -> None:
    assert not found(text)


def test_one_sentence_names_the_first_line_and_counts() -> None:
    told = syntax_warning(load_prompts(CASES / "syntax.txt"))
    assert told.startswith(f"4 of 4 prompts, the first in {CASES / 'syntax.txt'}:1, hold what other programs interpret")
    for example in ("(green:1.3)", "[fog]", "<lora:sea:0.8>", "BREAK", "{green|white}", "__water__"):
        assert f"such as {example}" in told


def test_what_comfyuis_encoders_interpret_is_not_told_there() -> None:
    prompts = [Prompt("a (green:1.3) boat, embedding:sea")]
    assert syntax_warning(prompts)
    assert not syntax_warning(prompts, by_comfyui=True)
    assert syntax_warning([Prompt("a <lora:x:1> boat")], by_comfyui=True)


@pytest.mark.parametrize("text", ["(", "[", "{", "__a", "<a", "(a:", "((a", "{a|", '"', "[a:", "(a)", "a ", "__a/"])
def test_the_patterns_take_time_that_grows_with_the_text_alone(text: str) -> None:
    for syntax in SYNTAXES:  # a pattern that goes back and forth would not end
        syntax.find(text * 20_000)


# --- pasted generation data ------------------------------------------------------------------------------------------


def test_a_pasted_infotext_is_an_error_with_the_line() -> None:
    with pytest.raises(UserError, match="pasted_infotext.txt:2: 'Negative prompt: blurry, text' is no prompt"):
        load_prompts(CASES / "pasted_infotext.txt")
    with pytest.raises(UserError, match="^Line 2: 'Negative prompt: blurry, text' is no prompt"):
        read_prompts((CASES / "pasted_infotext.txt").read_text())
    with pytest.raises(UserError, match="^The prompt: 'Steps: 20, Sampler: Euler' is no prompt"):
        refuse_foreign(Prompt("a boat\nSteps: 20, Sampler: Euler"))


@pytest.mark.parametrize(
    ("line", "foreign"),
    [
        ("Negative prompt: blurry", True),
        ("negative prompt:", True),
        ("Steps: 20, Sampler: Euler a, Seed: 1", True),
        ("Steps: 20, CFG scale: 7", True),
        ("Steps: 20", True),
        ("Steps: 20 of them, up a hill", False),
        ("a negative prompt: an essay", False),
        ("Steps: 20, made of marble", False),
    ],
)
def test_lines_of_an_infotext_are_known(line: str, foreign: bool) -> None:
    assert is_infotext_line(line) == foreign


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "a boat\\nNegative prompt: b"}', "p.jsonl:2: 'Negative prompt: b'"),
        ("p.txt", b"a boat\na\0b\n", "p.txt:2: holds a control character"),
        ("p.txt", "a boat".encode("utf-16-le"), "p.txt:1: holds a control character"),
        ("p.txt", "a boat".encode("utf-16"), "p.txt:1: not UTF-8"),
        ("p.jsonl", b"[" * 100_000, "p.jsonl:1: the line cannot be read: it is nested too deeply"),
        ("p.jsonl", b'{"prompt": "\\ud800"}', "p.jsonl:1: the line holds half a character"),
        ("p.jsonl", b'{"prompt": ["a"]}', 'p.jsonl:1: "prompt" must be there'),
    ],
)
def test_a_prompt_file_that_is_wrong_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_prompts(tmp_path / name)
    assert sentence in str(error.value)


@pytest.mark.slow
def test_many_long_lines_and_lines_twice_are_fine(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a boat on a lake, " * 50 + "\n")
    (tmp_path / "many.txt").write_bytes(b"\xef\xbb\xbf" + ("a boat on a lake " * 60 + "\r\n").encode() * 10_000)
    prompts = load_prompts(tmp_path / "many.txt")
    assert len(prompts) == 10_000
    assert not syntax_warning(prompts)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_tells_it_once_and_before_the_first_image(
    tmp_path: Path, sd3_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = write_quick(tmp_path, sd3_folder, iterations=1, reward="brightness")
    (tmp_path / "mine.txt").write_text("a red dog\n\na (blue:1.3) dog\n(red:2) fox <lora:x:1>\n")
    assert train.main([*argv, "--data.prompts", "mine.txt", "--data.held_out", ""]) == 0
    told = capsys.readouterr().out
    assert told.count("what other programs interpret") == 1
    assert "Warning: 2 of 3 prompts, the first in mine.txt:3, hold what other programs interpret" in told
    assert told.index("Warning: 2 of 3") < told.index("minutes")


@pytest.mark.slow
def test_a_run_refuses_a_pasted_infotext_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = write_quick(tmp_path, tmp_path / "no model", reward="brightness")
    assert train.main([*argv, "--data.prompts", str(CASES / "pasted_infotext.txt")]) == 2
    assert "pasted_infotext.txt:2:" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
