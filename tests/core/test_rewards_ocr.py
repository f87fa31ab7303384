"""OCR: the whole reward, on rendered text. The rules on strings: test_ocr_text.py."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.rewards import Reward, make_reward

pytestmark = pytest.mark.slow

PROMPT = 'A shop window with a sign that says "Hello World" at night'
CASES = Path(__file__).parents[1] / "cases" / "ocr"


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


def case(name: str) -> tuple[Tensor, str]:
    """A picture, float32 [1, 3, H, W], and the prompt that it shows."""
    picture = np.array(Image.open(CASES / f"{name}.png").convert("RGB"))
    prompt = json.loads((CASES / f"{name}.json").read_text(encoding="utf-8"))["prompt"]
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255, prompt


@pytest.mark.parametrize("name", ["two_signs", "inches", "apostrophe", "uneven_baseline"])
def test_a_picture_that_shows_what_was_asked_for_is_right(ocr: Reward, name: str) -> None:
    picture, prompt = case(name)
    ocr.check([Prompt(prompt)])
    assert ocr.score(picture, [prompt], [{}]).tolist() == [1]


def test_the_order_of_two_texts_counts_only_where_the_prompt_states_it(ocr: Reward) -> None:
    picture = rendered("Coffee", "Bakery").expand(3, -1, -1, -1)
    prompts = ['"Bakery" and "Coffee"', '"Coffee" above "Bakery"', '"Bakery" above "Coffee"']
    free, right, wrong = ocr.score(picture, prompts, [{}] * 3).tolist()
    assert free == right == 1
    assert wrong < 0.5


@pytest.mark.parametrize(
    "text", ["Привет", "שלום", "אבג", "مرحبا", "สวัสดี", "नमस्ते", "안녕하세요", "Ձմեռ", "გამარჯობა", "Open Привет", "٢٤"]
)
def test_a_script_that_the_reader_does_not_have_is_refused_before_anything_is_drawn(ocr: Reward, text: str) -> None:
    prompts = [Prompt('a sign "Open"'), Prompt(f'a sign "{text}"')]
    with pytest.raises(UserError, match="the prompt 'a sign .* no such characters") as error:
        ocr.check(prompts)
    assert text[-1] in str(error.value)
    with pytest.raises(UserError, match="no such characters"):
        ocr.check([Prompt("a sign", {"text": text})])


@pytest.mark.parametrize("text", ["Don’t Panic — 24/7…", "Café Größe Łódź", "ＯＰＥＮ", "营业中", "カフェ", "½ Price™"])
def test_what_the_reader_has_is_accepted_in_any_form(ocr: Reward, text: str) -> None:
    ocr.check([Prompt(f"a sign “{text}”")])
