"""What the reward `ocr` asks for and compares: quotation marks, orders, forms of a character, the order of reading."""

import unicodedata

import numpy as np
import pytest

from dgpo_core.common.errors import UserError
from dgpo_core.rewards.ocr.reader import readings
from dgpo_core.rewards.ocr.text import (
    edit_distance,
    likeness,
    normal,
    quoted,
    readable,
    unreadable,
    wanted_texts,
)

PROMPT = 'A shop window with a sign that says "Hello World" at night'


# -- distances


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("kitten", "sitting", 3), ("flaw", "lawn", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, [b]) == distance
    assert edit_distance(b, [a]) == distance


@pytest.mark.parametrize(
    ("found", "texts", "distance"),
    [
        ("onetwo", ["one", "two"], 0),
        ("twoone", ["one", "two"], 0),
        ("threeonetwo", ["one", "two", "three"], 0),
        ("twxone", ["one", "two"], 1),
        ("one", ["one", "two"], 3),
        ("twosaleone", ["one", "two"], 4),
        ("", ["one", "two"], 6),
        ("neo two", ["one", "two"], 3),  # letters do not change places
    ],
)
def test_several_texts_count_in_any_order(found: str, texts: list, distance: int) -> None:
    assert edit_distance(found, texts) == distance
    assert edit_distance(found, texts[::-1]) == distance


@pytest.mark.parametrize(
    ("found", "share"),
    [
        ("Hello World", 1.0),
        ("HELLO\nworld", 1.0),
        ("Helo World", 0.9),
        ("", 0.0),
        ("Hello World!!", 0.8),
        ("SALE Hello World", 0.6),  # no exemption for a text that merely contains the right one
        ("World Hello", 0.2),  # one text has one order
        ("entirely other words, and many of them", 0.0),
    ],
)
def test_likeness(found: str, share: float) -> None:
    assert likeness(found, ["Hello World"]) == pytest.approx(share)


@pytest.mark.parametrize(
    ("found", "share"), [("Coffee Bakery", 1.0), ("Bakery", 0.5), ("Bakery Coffee Bakery", 0.5), ("Bakery Tea", 0.5)]
)
def test_extra_and_missing_texts_cost_their_letters(found: str, share: float) -> None:
    assert likeness(found, ["Bakery", "Coffee"]) == pytest.approx(share, abs=0.1)


# -- forms of one character


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("Don’t Panic", "DON'T PANIC"),
        ("Don't", "Don‘t"),
        ("ＯＰＥＮ ２４", "OPEN 24"),
        (unicodedata.normalize("NFD", "Café Größe"), "café größe"),
        ("ﬁne ﬂour", "fine flour"),
        ("9–5", "9-5"),
        ("Tea — Cake", "TEA - CAKE"),
        ("Wait…", "wait..."),
        ("“Hi”", '"hi"'),
        ("½ price", "1/2 price"),
        ("№ 5", "No 5"),
        ("Stra\u00adße\u200b", "strasse"),
        ("I ♥️ NY", "I♥NY"),
        ("ｶﾌｪ", "カフェ"),
    ],
)
def test_forms_of_one_character_are_equal(wanted: str, found: str) -> None:
    assert likeness(found, [wanted]) == 1
    assert likeness(wanted, [found]) == 1


def test_other_letters_are_not_equal() -> None:
    assert likeness("cafe", ["café"]) == 0.75
    assert normal("Ä") != normal("A")


# -- what a prompt asks for


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (PROMPT, ["Hello World"]),
        ("a poster “Grand Opening”, a dog", ["Grand Opening"]),
        ("ein Schild „Bäckerei“ und „Café”", ["Bäckerei", "Café"]),
        ("une pancarte « Bonjour » et «Merci»", ["Bonjour", "Merci"]),
        ("ein Schild »Hallo« und ›Welt‹", ["Hallo", "Welt"]),
        ("en skylt ”Hej”", ["Hej"]),
        ("看板「開店」と『閉店』", ["開店", "閉店"]),
        ("写着“你好”的招牌", ["你好"]),
        ('写着"你好"的招牌', ["你好"]),
        ("a sign ＂OPEN＂", ["OPEN"]),
        ('half typographic “Hello" and “World", "Bye”', ["Hello", "World", "Bye"]),
        ('"He said “Hi” now"', ["He said “Hi” now"]),
        ('“He said "Hi" now”', ['He said "Hi" now']),
        ('a sign "12" and "7"', ["12", "7"]),
        ('"Level 1","(A)"', ["Level 1", "(A)"]),
        ('a cup ""Tea""', ["Tea"]),
    ],
)
def test_quotation_marks_of_all_kinds(prompt: str, texts: list) -> None:
    assert quoted(prompt) == texts


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a 12" ruler with the word "Measure"', ["Measure"]),
        ('a 12 " ruler with the word "Measure"', ["Measure"]),
        ("a 12” ruler with the word “Measure”", ["Measure"]),
        ('a ½" bolt "Go"', ["Go"]),
        ('an 8"x10" photo that says "Me"', ["Me"]),
        ('a man of 5\'10" with a shirt "Tall"', ["Tall"]),
        ("a 5'10'' man's 'Yes' sign", ["Yes"]),
        ('a 27" monitor and a 32" TV showing "Hi"', ["Hi"]),
        ('"Only 5" on a 24" TV reading "Sale"', ["Only 5", "Sale"]),
        ('a sign "Room 12" beside a 6" pipe', ["Room 12"]),
        ('the label "12" ruler"', ['12" ruler']),
        ('Room 12 "Kitchen"', ["Kitchen"]),
        ('a 27" monitor and a 32" TV', []),
        ("a 12” ruler and a 6” pipe", []),
        ("a 6' board and a 4' board", []),
    ],
)
def test_marks_of_inches_and_feet_are_no_quotation(prompt: str, texts: list) -> None:
    assert quoted(prompt) == texts


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a sign 'Open' on a dog's kennel", ["Open"]),
        ("a sign 'Don't Panic'", ["Don't Panic"]),
        ("a sign ‘Don’t Panic’", ["Don’t Panic"]),
        ("a sign 'Dogs' Day'", ["Dogs' Day"]),
        ("signs 'Dogs' and 'Cats'", ["Dogs", "Cats"]),
        ("a sign \"Rock 'n' Roll\"", ["Rock 'n' Roll"]),
        ("a \"Stop\" sign by the 'old' mill", ["Stop"]),  # where there are double ones, single ones are none
        ("a dog that doesn't read", []),
        ("a dog's toy and a cat's bed", []),
        ("rock 'n' roll", []),
        ("the '90s dogs' home", []),
    ],
)
def test_apostrophes_are_no_quotation(prompt: str, texts: list) -> None:
    assert quoted(prompt) == texts


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('two signs: "Bakery" and "Coffee"', ["Bakery", "Coffee"]),
        ('"Sale" over the door, and a mat "Welcome"', ["Sale", "Welcome"]),
        ('"One" above "Two"', ["One Two"]),
        ('"One", and then the word "Two"', ["One Two"]),
        ('"One" to the left of "Two"', ["One Two"]),
        ('"One" below "Two"', ["Two One"]),
        ('"One" directly under the text "Two" and "Three"', ["Two One", "Three"]),
    ],
)
def test_an_order_counts_where_the_prompt_states_it(prompt: str, texts: list) -> None:
    assert quoted(prompt) == texts


def test_metadata_comes_before_quotation_marks() -> None:
    assert wanted_texts(PROMPT, {"text": "Bye"}) == ("Bye",)
    assert wanted_texts(PROMPT, {"text": ["Bye", "Now"]}) == ("Bye", "Now")


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [
        ("a dog that doesn't read", {}),
        ('an empty sign " "', {}),
        ('a sign "\u200b"', {}),
        ('a 12" ruler', {}),
        (PROMPT, {"text": ""}),
        (PROMPT, {"text": 3}),
        (PROMPT, {"text": []}),
        (PROMPT, {"text": ["Bye", 3]}),
        (PROMPT, {"text": {"Bye": 1}}),
    ],
)
def test_a_prompt_without_text_is_named(prompt: str, metadata: dict) -> None:
    with pytest.raises(UserError, match="put it in double quotes") as error:
        wanted_texts(prompt, metadata)
    assert prompt[:8] in str(error.value)


@pytest.mark.parametrize("prompt", ['"a" ' * 9, '"' + "long " * 200 + '"'])
def test_a_prompt_that_asks_for_too_much_is_named(prompt: str) -> None:
    with pytest.raises(UserError, match="reads at most 8 texts and 400 letters"):
        wanted_texts(prompt, {})


# -- what a reader has


def test_only_what_the_reader_has_may_be_asked_for() -> None:
    letters = readable([*"ABCabcé'-ß½/12", "blank", "ℵ"])
    assert unreadable(["a b–c ‘B’ É ß ½"], letters) == []
    assert unreadable(["aЖbжЖ"], letters) == ["Ж", "ж"]
    assert unreadable(["א"], letters) == ["א"]  # the sign alef is no Hebrew
    assert unreadable(["e\u0301"], letters) == []
    assert unreadable(["blank"], letters) == ["l", "n", "k"]


# -- the order of reading


def box(left: float, top: float, width: float, height: float = 20, tilt: float = 0.0) -> np.ndarray:
    """The corners of a box, turned about the origin by `tilt` degrees."""
    corners = np.array([(left, top), (left + width, top), (left + width, top + height), (left, top + height)])
    turn = np.radians(tilt)
    return corners @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])


@pytest.mark.parametrize("drop", [-9, -6, 0, 6, 9])
def test_words_a_little_apart_in_height_are_one_line(drop: float) -> None:
    assert readings(["Morning", "Good"], np.stack([box(100, 50 + drop, 90), box(10, 50, 60)]))[0] == "Good Morning"


def test_words_along_a_slant_are_one_line() -> None:
    boxes = np.stack([box(10 + 80 * i, 50 - 8 * i, 60) for i in range(5)])
    assert readings(list("abcde"), boxes)[0] == "a b c d e"


@pytest.mark.parametrize("tilt", [-25, -10, 0, 10, 25])
def test_lines_are_read_from_top_to_bottom_however_the_sign_hangs(tilt: float) -> None:
    boxes = np.stack(
        [
            box(120, 80, 90, tilt=tilt),
            box(10, 50, 90, tilt=tilt),
            box(120, 50, 90, tilt=tilt),
            box(10, 80, 90, tilt=tilt),
        ]
    )
    assert readings(["four", "one", "two", "three"], boxes)[0] == "one two three four"


def test_two_signs_beside_each_other_are_read_one_after_the_other() -> None:
    boxes = np.stack([box(10, 50, 60), box(200, 50, 60), box(10, 80, 60), box(200, 80, 60)])
    assert readings(["Good", "Hot", "Morning", "Coffee"], boxes)[1] == "Good Morning Hot Coffee"
