"""`python -m dgpo_core.prompts`: sets of prompts that the rewards accept, the same for a seed, apart from others."""

import contextlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dgpo_core import prompts as prompt_sets
from dgpo_core.common.prompts import Prompt, load_prompts
from dgpo_core.rewards.geneval import prompts as geneval_prompts
from dgpo_core.rewards.geneval.detector import ALIASES
from dgpo_core.rewards.geneval.rules import TAGS, check_metadata
from dgpo_core.rewards.ocr import prompts as ocr_prompts
from dgpo_core.rewards.ocr.text import normal, readable, unreadable, wanted_texts

COCO = """person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter
bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis
snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork
knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed
dining_table toilet tv laptop mouse remote keyboard cell_phone microwave oven toaster sink refrigerator book clock vase
scissors teddy_bear hair_drier toothbrush"""
"""As the data set calls them."""


def write(path: Path, *arguments: str) -> list[Prompt]:
    kind, *rest = arguments
    prompt_sets.run([kind, "--out", str(path), *rest])
    return load_prompts(path)


def test_the_objects_are_those_that_a_detector_on_coco_finds() -> None:
    names = [name.replace("_", " ") for name in COCO.split()]
    assert sorted(geneval_prompts.OBJECTS) == sorted(ALIASES.get(name, name) for name in names)


def test_geneval_prompts_are_accepted_by_the_reward_and_cover_its_tasks(tmp_path: Path) -> None:
    prompts = write(tmp_path / "a.jsonl", "geneval", "--count", "180")
    assert len({prompt.text for prompt in prompts}) == 180
    for prompt in prompts:
        check_metadata(prompt.text, prompt.metadata, geneval_prompts.OBJECTS)
    tasks = Counter(prompt.metadata["tag"] for prompt in prompts)
    assert set(tasks) == set(TAGS)
    assert tasks == {
        "position": 70,
        "counting": 50,
        "color_attr": 30,
        "colors": 10,
        "two_object": 10,
        "single_object": 10,
    }


def test_geneval_prompts_say_what_their_facts_ask_for(tmp_path: Path) -> None:
    for prompt in write(tmp_path / "a.jsonl", "geneval", "--count", "300"):
        text, include = prompt.text, prompt.metadata["include"]
        for wish in include:
            name = geneval_prompts.PLURALS.get(wish["class"], wish["class"]) if wish["count"] > 1 else wish["class"]
            assert name in text
            assert f"{wish.get('color', '')} ".lstrip() in text
        if prompt.metadata["tag"] == "position":
            relation, target = include[1]["position"]
            assert target == 0
            first, second = text.split(f" {relation} ")
            assert include[1]["class"] in first
            assert include[0]["class"] in second
        if prompt.metadata["tag"] == "counting":
            count = include[0]["count"]
            assert {2: " two ", 3: " three ", 4: " four "}[count] in text
            assert prompt.metadata["exclude"] == [{"class": include[0]["class"], "count": count + 1}]


@pytest.mark.parametrize(
    ("name", "plural"),
    [("knife", "knives"), ("bench", "benches"), ("bus", "buses"), ("person", "people"), ("cup", "cups")],
)
def test_plurals(name: str, plural: str) -> None:
    assert geneval_prompts.plural(name) == plural


def test_ocr_prompts_quote_texts_of_the_stated_length(tmp_path: Path) -> None:
    prompts = write(tmp_path / "a.jsonl", "ocr", "--count", "300", "--letters", "5", "30")
    assert len({prompt.text for prompt in prompts}) == 300
    letters = readable("abcdefghijklmnopqrstuvwxyz")
    lengths = set()
    for prompt in prompts:
        (text,) = wanted_texts(prompt.text, {})  # what stands in quotation marks ...
        assert prompt.metadata == {"text": text}  # ... is what the facts say
        assert unreadable([text.replace(" ", "")], letters) == []
        lengths.add(len(normal(text)))
    assert lengths == set(range(5, 31))


@pytest.mark.parametrize("length", [3, 18, 60])
def test_one_length_alone(length: int, tmp_path: Path) -> None:
    prompts = write(tmp_path / "a.jsonl", "ocr", "--count", "20", "--letters", str(length), str(length))
    assert {len(normal(prompt.metadata["text"])) for prompt in prompts} == {length}


@pytest.mark.parametrize("kind", ["geneval", "ocr"])
def test_the_same_seed_writes_the_same_file(kind: str, tmp_path: Path) -> None:
    for name, seed in [("a", "3"), ("b", "3"), ("c", "4")]:
        write(tmp_path / f"{name}.jsonl", kind, "--count", "40", "--seed", seed)
    a, b, c = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_geneval_prompts_ask_for_nothing_that_an_excluded_file_asks_for(tmp_path: Path) -> None:
    held_out = write(tmp_path / "a.jsonl", "geneval", "--count", "800")
    prompts = write(tmp_path / "b.jsonl", "geneval", "--count", "800", "--exclude", str(tmp_path / "a.jsonl"))
    assert not {prompt.text for prompt in held_out} & {prompt.text for prompt in prompts}
    assert not {*map(geneval_prompts.meaning, held_out)} & {*map(geneval_prompts.meaning, prompts)}


@pytest.mark.parametrize(
    ("tag", "a", "b"),
    [
        ("two_object", [("dog", "", None), ("cat", "", None)], [("cat", "", None), ("dog", "", None)]),
        ("color_attr", [("dog", "red", None), ("cat", "blue", None)], [("cat", "blue", None), ("dog", "red", None)]),
        ("position", [("dog", "", None), ("cat", "", "above")], [("cat", "", None), ("dog", "", "below")]),
    ],
)
def test_the_same_picture_in_other_words_is_the_same_prompt(tag: str, a: list, b: list) -> None:
    def asks(things: list, text: str) -> Prompt:
        include = [
            {"class": name, "count": 1, **({"color": color} if color else {}), **({"position": [r, 0]} if r else {})}
            for name, color, r in things
        ]
        return Prompt(text, {"tag": tag, "include": include})

    assert geneval_prompts.meaning(asks(a, "a")) == geneval_prompts.meaning(asks(b, "b"))
    other = [*a[:1], (a[1][0], "pink", a[1][2])]
    assert geneval_prompts.meaning(asks(a, "a")) != geneval_prompts.meaning(asks(other, "a"))


def test_ocr_prompts_quote_no_text_that_an_excluded_file_quotes(tmp_path: Path) -> None:
    few = ["ocr", "--count", "60", "--letters", "3", "4"]
    held_out = write(tmp_path / "a.jsonl", *few)
    (tmp_path / "b.txt").write_text('a sign "ROAD"\na sign without text\n')
    both = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]
    texts = {normal(prompt.metadata["text"]) for prompt in write(tmp_path / "c.jsonl", *few, "--exclude", *both)}
    assert texts
    assert not texts & ({normal(prompt.metadata["text"]) for prompt in held_out} | {"road"})


def test_a_prompt_of_an_excluded_text_file_is_left_out_by_its_words(tmp_path: Path) -> None:
    asked = {prompt.text for prompt in write(tmp_path / "a.jsonl", "geneval", "--count", "50")}
    (tmp_path / "words.txt").write_text("\n".join(text.upper() for text in asked))
    prompts = write(tmp_path / "b.jsonl", "geneval", "--count", "50", "--exclude", str(tmp_path / "words.txt"))
    assert not asked & {prompt.text for prompt in prompts}


def test_that_a_text_file_excludes_words_alone_is_told(tmp_path: Path) -> None:
    held = write(tmp_path / "a.jsonl", "geneval", "--count", "150")
    (tmp_path / "a.txt").write_text("".join(f"{prompt.text}\n" for prompt in held))
    told = {}
    for kind in ("jsonl", "txt"):
        arguments = ["geneval", "--count", "5", "--out", str(tmp_path / f"of_{kind}.jsonl"), "--seed", "2"]
        told[kind] = prompt_sets.run([*arguments, "--exclude", str(tmp_path / f"a.{kind}")])
    assert "--exclude" not in told["jsonl"]
    assert "; 150 of the 150 prompts of --exclude have no facts of GenEval's, so that only their words" in told["txt"]


def test_facts_that_are_not_genevals_exclude_nothing_but_their_words(tmp_path: Path) -> None:
    odd = [
        {"tag": 3},
        {"tag": "colors", "include": [{"class": ["dog"]}]},
        {"include": "all"},
        {"tag": [], "exclude": [3]},
    ]
    lines = [json.dumps({"prompt": f"a photo {n}", **facts}) for n, facts in enumerate(odd)]
    (tmp_path / "odd.jsonl").write_text("\n".join(lines))
    assert len(write(tmp_path / "b.jsonl", "geneval", "--count", "20", "--exclude", str(tmp_path / "odd.jsonl"))) == 20


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Nothing says for which reward: begin with geneval or ocr"),
        (["genevals", "--count", "3"], "There are no prompts for 'genevals': begin with geneval or ocr"),
        (["\x1b[2J"], r"There are no prompts for '\\x1b"),
        (["geneval", "--out", "{out}"], "--count"),
        (["geneval", "--count", "3"], "--out"),
        (["geneval", "--count", "many", "--out", "{out}"], "--count"),
        (["geneval", "--count", "0", "--out", "{out}"], "--count must be 1 to 1,000,000, not 0"),
        (["ocr", "--count", "-1", "--out", "{out}"], "--count must be 1 to 1,000,000, not -1"),
        (["ocr", "--count", str(10**18), "--out", "{out}"], "--count must be 1 to 1,000,000"),
        (["geneval", "--count", "3", "--out", "{folder}/a.txt"], "--out must name a .jsonl file"),
        (["geneval", "--count", "3", "--out", "{there}"], "There is already a file"),
        (["geneval", "--count", "3", "--out", "{folder}/no/a.jsonl"], "Cannot write .*no such file or directory"),
        (["geneval", "--count", "3", "--out", "{out}", "--exclude", "{folder}/no.txt"], "no.txt"),
        (["geneval", "--count", "3", "--out", "{out}", "--exclude", "{broken}"], "broken.jsonl"),
        (["geneval", "--count", "3", "--out", "{out}", "--letters", "3", "4"], "There is no option --letters"),
        (["geneval", "--count", "3", "--out", "{out}", "--seed", "x"], "--seed"),
        (["ocr", "--count", "3", "--out", "{out}", "--letters", "9", "4"], "--letters must be .* not 9 4"),
        (["ocr", "--count", "3", "--out", "{out}", "--letters", "2", "4"], "--letters must be .* 3 to 60"),
        (["ocr", "--count", "3", "--out", "{out}", "--letters", "4", "61"], "--letters must be .* 3 to 60"),
        (["ocr", "--count", "3", "--out", "{out}", "--letters", "4"], "--letters"),
    ],
)
def test_wrong_arguments_are_one_clear_sentence_and_write_nothing(
    arguments: list, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.jsonl").write_text("mine")
    (tmp_path / "broken.jsonl").write_text('{"prompt": ')
    places = {name: str(tmp_path / f"{name}.jsonl") for name in ("out", "there", "broken")}
    before = sorted(tmp_path.iterdir())
    assert prompt_sets.main([text.format(folder=tmp_path, **places) for text in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert re.search(says, error)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.jsonl").read_text() == "mine"


def test_all_prompts_of_geneval_can_be_had_and_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(geneval_prompts, "OBJECTS", ("person", "dog", "cat", "cup", "tie"))
    total = 5 + 5 * 3 + 4 * 10 + 10 + 6 * 90 + 10 * 4  # objects, counts, colours, pairs, coloured pairs, places
    prompts = write(tmp_path / "a.jsonl", "geneval", "--count", str(total))
    assert len({geneval_prompts.meaning(prompt) for prompt in prompts}) == total
    with pytest.raises(prompt_sets.UserError, match=f"only {total} different prompts .* not {total + 1}: ask"):
        write(tmp_path / "b.jsonl", "geneval", "--count", str(total + 1))
    assert not (tmp_path / "b.jsonl").exists()


def test_more_texts_than_exist_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, values in {"CARRIERS": ("a sign",), "PLACES": ("at night",), "VERBS": ("that says",)}.items():
        monkeypatch.setattr(ocr_prompts, name, values)
    arguments = ["ocr", "--count", "1000", "--letters", "3", "3", "--out", str(tmp_path / "a.jsonl")]
    with pytest.raises(prompt_sets.UserError, match=r"only about \d\d different prompts with texts of 3 to 3 letters"):
        prompt_sets.run(arguments)


@pytest.mark.slow
@pytest.mark.processes
def test_the_command_writes_a_file_and_says_what_is_in_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dgpo_core.prompts", "geneval", "--count", "18", "--out", "a.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("a.jsonl: 18 prompts (7 position, 5 counting, 3 color_attr, ")
    assert len(load_prompts(tmp_path / "a.jsonl")) == 18


@pytest.mark.parametrize("arguments", [["--help"], ["geneval", "--help"], ["ocr", "--help"]])
def test_help_names_the_options(arguments: list, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # as argument parsers end
        assert prompt_sets.main(arguments) == 0
    assert "--count" in capsys.readouterr().out
