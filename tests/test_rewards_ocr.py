"""OCR: the rule on strings, and the whole reward on rendered text."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dgpo_core.errors import UserError
from dgpo_core.rewards import Reward, make_reward
from dgpo_core.rewards.ocr import edit_distance, likeness, wanted_text

PROMPT = 'A shop window with a sign that says "Hello World" at night'


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("kitten", "sitting", 3), ("flaw", "lawn", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance
    assert edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("found", "share"),
    [
        ("Hello World", 1.0),
        ("HELLO\nworld", 1.0),
        ("Helo World", 0.9),
        ("", 0.0),
        ("Hello World!!", 0.8),
        ("SALE Hello World", 0.6),  # no exemption for a text that merely contains the right one
        ("entirely other words, and many of them", 0.0),
    ],
)
def test_likeness(found: str, share: float) -> None:
    assert likeness(found, "Hello World") == pytest.approx(share)


def test_wanted_text() -> None:
    assert wanted_text(PROMPT, {}) == "Hello World"
    assert wanted_text("a poster “Grand Opening”, a dog", {}) == "Grand Opening"
    assert wanted_text('"One" above "Two"', {}) == "One Two"
    assert wanted_text(PROMPT, {"text": "Bye"}) == "Bye"


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [("a dog that doesn't read", {}), ('an empty sign " "', {}), (PROMPT, {"text": ""}), (PROMPT, {"text": 3})],
)
def test_a_prompt_without_text_is_named(prompt: str, metadata: dict) -> None:
    with pytest.raises(UserError, match="put it in double quotes") as error:
        wanted_text(prompt, metadata)
    assert repr(prompt) in str(error.value)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match="pip install rapidocr onnxruntime"):
        make_reward("ocr")


def test_wrong_threads() -> None:
    with pytest.raises(UserError, match="threads"):
        make_reward("ocr", {"threads": -1})


def rendered(*lines: str) -> Tensor:
    """Dark text on a light picture, float32 [1, 3, 256, 512]."""
    picture = Image.new("RGB", (512, 256), "#e8e4d8")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=56)
    for row, line in enumerate(lines):
        pen.text((40, 30 + 90 * row), line, fill="#202060", font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def ocr() -> Reward:
    if not (importlib.util.find_spec("rapidocr") and importlib.util.find_spec("onnxruntime")):
        pytest.skip("rapidocr and onnxruntime are not installed (the extra [ocr])")
    return make_reward("ocr", {"threads": 1})


def test_reads_rendered_text(ocr: Reward) -> None:
    pictures = {
        "right": rendered("Hello World"),
        "two lines": rendered("HELLO", "WORLD"),
        "misspelt": rendered("Hella World"),
        "wrong": rendered("Bicycle Fish"),
        "absent": rendered(),
        "with more": rendered("Hello World", "SALE TODAY"),
    }
    scores = ocr.score(torch.cat(list(pictures.values())), [PROMPT] * 6, [{}] * 6)
    assert scores.shape == (6,)
    got = dict(zip(pictures, scores.tolist(), strict=True))
    assert got["right"] == 1
    assert got["two lines"] == 1
    assert got["misspelt"] == pytest.approx(0.9)
    assert got["wrong"] < 0.3
    assert got["absent"] == 0
    assert got["with more"] == pytest.approx(0.1)


def test_each_image_is_read_for_its_own_prompt(ocr: Reward) -> None:
    images = torch.cat([rendered("Hello World"), rendered("Bicycle")])
    assert ocr.score(images, [PROMPT, 'a "bicycle"'], [{}, {}]).tolist() == [1, 1]
    assert ocr.score(images, [PROMPT, "a word"], [{}, {"text": "bicycle"}]).tolist() == [1, 1]
