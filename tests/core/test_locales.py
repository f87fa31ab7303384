"""Translations: each language has every text, with its numbers. A real ComfyUI tells whether they are the nodes'."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

LOCALES = Path(__file__).parents[2] / "locales"
LANGUAGES = sorted(path.name for path in LOCALES.iterdir() if path.name != "en")
SAME = 25  # texts at most that are the same in both languages: names such as LoRA, and words such as images


def read(language: str, name: str) -> Any:
    return json.loads((LOCALES / language / name).read_text("utf-8"))


def flat(value: Any, at: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """The texts by where they are."""
    if isinstance(value, str):
        return {at: value}
    return {key: text for name, inner in value.items() for key, text in flat(inner, (*at, name)).items()}


def numbers(text: str) -> Counter[str]:
    return Counter(number.replace(",", ".") for number in re.findall(r"\d+(?:[.,]\d+)?", text))


def test_the_languages_are_those_that_are_promised() -> None:
    assert LANGUAGES == ["de", "es", "fr", "ja", "ko", "ru", "zh"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_there_and_is_the_one_in_the_list_of_words(language: str) -> None:
    english, words = flat(read("en", "nodeDefs.json")), read(language, "words.json")
    assert flat(read(language, "nodeDefs.json")) == {key: words[text] for key, text in english.items()}
    assert set(words) == set(english.values())  # none is left over
    assert [text for text, word in words.items() if not word.strip()] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_loses_no_number_and_is_one(language: str) -> None:
    words = read(language, "words.json")
    assert [text for text, word in words.items() if numbers(text) - numbers(word)] == []
    assert len([text for text, word in words.items() if text == word]) <= SAME
