"""Prompts that stand for many: what is drawn of them, from which files, and what is refused."""

import contextlib
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.wildcards import draw, drawn
from dgpo_core.runs import assemble
from dgpo_core.settings.config import Config, DataConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two colours, one of which is more than one; and animals in a folder of their own."""
    (tmp_path / "animals").mkdir()
    (tmp_path / "colour.txt").write_text("red\n# no colour\n\n{light|dark} blue\n", encoding="utf-8")
    (tmp_path / "animals" / "cats.txt").write_text("\ufeffa __colour__ cat\n", encoding="utf-8")
    return tmp_path


def all_of(text: str, folder: Path, times: int = 200) -> set[str]:
    return {draw(text, random.Random(seed), folder) for seed in range(times)}


def test_each_choice_is_drawn_and_choices_may_hold_choices_and_files(folder: Path) -> None:
    assert all_of("a {red|blue} {cat|{big|small} dog}", folder) == {
        f"a {colour} {animal}" for colour in ("red", "blue") for animal in ("cat", "big dog", "small dog")
    }
    assert all_of("__animals/cats__ asleep", folder) == {
        f"a {colour} cat asleep" for colour in ("red", "light blue", "dark blue")
    }


def test_a_choice_with_a_share_is_drawn_as_often_as_it_says(folder: Path) -> None:
    seen = Counter(draw("{3::cat|dog}", random.Random(seed), folder) for seed in range(2000))
    assert seen["cat"] / 2000 == pytest.approx(0.75, abs=0.03)  # three standard errors


def test_a_choice_in_a_file_ends_where_a_prompt_does(folder: Path) -> None:
    (folder / "hue.txt").write_bytes("red\u2028green\r\nblue\n".encode())
    assert all_of("a __hue__ dot", folder) == {"a red green dot", "a blue dot"}  # white space is one blank


@pytest.mark.parametrize("share", ["0.33333", ".5", "2.", "12345", "0.000000001"])
def test_any_decimal_number_is_a_share(share: str, folder: Path) -> None:
    assert all_of(f"a {{{share}::red|{share}::blue}} dot", folder) == {"a red dot", "a blue dot"}


def test_a_share_counts_in_files_too(folder: Path) -> None:
    (folder / "hue.txt").write_text("3::green\n{red|dark red}\n0::blue\n", encoding="utf-8")
    seen = Counter(draw("a __hue__ dot", random.Random(seed), folder) for seed in range(2000))
    assert set(seen) == {"a green dot", "a red dot", "a dark red dot"}
    assert seen["a green dot"] / 2000 == pytest.approx(0.75, abs=0.03)  # three standard errors


def test_a_seed_keeps_the_texts_that_it_drew_before_there_were_shares_in_files(folder: Path) -> None:
    texts = [draw("__colour__ {2::a|b} __animals/cats__", random.Random(seed), folder) for seed in range(4)]
    assert texts == ["light blue a a red cat", "red a a dark blue cat", "red a a red cat", "red b a light blue cat"]


def test_an_empty_choice_leaves_no_gap(folder: Path) -> None:
    assert all_of("a {big |}cat", folder) == {"a big cat", "a cat"}
    assert all_of("a {big|} cat", folder) == {"a big cat", "a cat"}


def test_marks_mean_themselves_behind_a_backslash_and_where_nothing_is_to_choose(folder: Path) -> None:
    assert draw(r"a sign that says \{yes\|no\}", random.Random(0), folder) == "a sign that says {yes|no}"
    for words in ("a {cat}, {a:b} and snake__case__word", "a screen with __init__.py"):
        assert draw(words, random.Random(0), folder) == words


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        (r"a {red \{x\}|blue} circle", {"a red {x} circle", "a blue circle"}),
        (r"a {red\|green|b\}} circle", {"a red|green circle", "a b} circle"}),
        (r"a {big {\{|\}}|small} circle", {"a big { circle", "a big } circle", "a small circle"}),
        (r"a {2::\{x\}|C:\dir} circle", {"a {x} circle", r"a C:\dir circle"}),
        (r"a \{word\} circle", {"a {word} circle"}),
        (r"a $\{c\} and \{2$$x\}", {"a ${c} and {2$$x}"}),
        ("a {$5|$$9|US$$} cat", {"a $5 cat", "a $$9 cat", "a US$$ cat"}),
        ("for ${5|10}", {"for $5", "for $10"}),
        (r"a \| and a \ (\(x\))", {r"a | and a \ (\(x\))"}),
    ],
)
def test_what_is_behind_a_backslash_means_itself_in_choices_and_in_prompts_without_any(
    text: str, texts: set[str], folder: Path
) -> None:
    assert {prompt.text for prompt in drawn([Prompt(text)], 50, 0, folder)} == texts


@pytest.mark.parametrize("start", ["", "{", "{a|"])
@pytest.mark.parametrize("text", ["{", "{a|", "a|", r"{\{", r"{a|\}", "{|", r"\{", r"\|", "\\", "9", "${a", "{2$$"])
def test_choices_without_an_end_take_time_that_grows_with_the_text_alone(start: str, text: str, folder: Path) -> None:
    with contextlib.suppress(UserError):  # for what is refused
        draw(start + text * 20_000, random.Random(0), folder)


def test_what_is_drawn_depends_on_the_seed_and_the_place_alone(folder: Path) -> None:
    prompts = [Prompt("a {red|blue|green|black} {cat|dog|fox|owl}"), Prompt("a lamp"), Prompt("{1|2|3|4|5|6} eggs")]
    found = drawn(prompts, 3, 7, folder)
    assert drawn(prompts, 3, 7, folder) == found
    assert drawn([*prompts[:2], Prompt("more")], 3, 7, folder)[:4] == found[:4]
    assert drawn(prompts, 3, 8, folder) != found
    assert Prompt("a lamp") in found


def test_texts_differ_and_keep_where_they_are_from(folder: Path) -> None:
    prompt = Prompt("a {red|blue} cat", {"tag": "x"}, "file:3")
    found = drawn([prompt], 50, 0, folder)
    assert sorted(one.text for one in found) == ["a blue cat", "a red cat"]
    assert all(one.metadata == {"tag": "x", "template": "a {red|blue} cat"} and one.where == "file:3" for one in found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a __color__ cat", "no file for the wildcard __color__ in .*did you mean colour?"),
        ("a __animals/../../x__ cat", "is outside of the folder"),
        ("__round__", "names itself"),
        ("{|}", "may all be empty"),
        ("a {0::red|0::blue} cat", "no choice in .0::red.0::blue. is ever drawn"),
        ("a {" + "9" * 400 + "::red|blue} cat", "the shares in .* are too large to count"),
        ("a __never__ cat", "no choice in the wildcard file .*never.txt is ever drawn: give one a share"),
        ("__empty__", "has no line to choose"),
        ("a {2$$red|blue} cat", r"'.2..red.blue.' asks for several choices at once, .*: write a choice for each"),
        ("a {1-2$$, $$red|blue} cat", "asks for several choices at once"),
        ("a {2-$$__colour__} cat", "asks for several choices at once"),
        ("a { -2$$__colour__} cat", "asks for several choices at once"),
        ("a __several__ cat", "asks for several choices at once"),
        ("a ${c=!{red|blue}} cat", r"'..c=!' is a variable, and there are none here: write what it stands for"),
        ("a {cat|${c} dog}", "is a variable"),
        ("a __variable__", "is a variable"),
    ],
)
def test_what_cannot_be_drawn_is_told_with_the_line(text: str, says: str, folder: Path) -> None:
    (folder / "round.txt").write_text("a __round__\n", encoding="utf-8")
    (folder / "never.txt").write_text("0::red\n0.0::blue\n", encoding="utf-8")
    (folder / "several.txt").write_text("{2$$red|blue}\n", encoding="utf-8")
    (folder / "variable.txt").write_text("${c} cat\n", encoding="utf-8")
    (folder / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(UserError, match=says) as error:
        drawn([Prompt(text, where="mine.txt:4")], 1, 0, folder)
    assert "mine.txt:4" in str(error.value) or text == "__empty__"


def test_a_file_that_a_link_leads_out_to_is_not_read(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.txt"
    outside.write_text("secret\n", encoding="utf-8")
    (folder / "secret.txt").symlink_to(outside)
    with pytest.raises(UserError, match="no file for the wildcard __secret__"):
        draw("__secret__", random.Random(0), folder)


def test_a_run_draws_where_it_is_asked_to_and_else_takes_words(folder: Path) -> None:
    data = DataConfig(text="a __colour__ cat\na lamp", held_out_text="a {red|blue} fox", wildcard_folder=str(folder))
    config = replace(Config(), data=data)
    assert [p.text for p in assemble.training_prompts(config)] == ["a __colour__ cat", "a lamp"]
    asked = replace(config, data=replace(data, wildcards=20))
    training = {p.text for p in assemble.training_prompts(asked)}
    assert training == {"a red cat", "a light blue cat", "a dark blue cat", "a lamp"}
    assert {p.text for p in assemble.held_out_prompts(asked)} == {"a red fox", "a blue fox"}
