"""What the reward `ocr` compares: the texts that a prompt asks for, and how far what was read is from them."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown

MOST_TEXTS = 8
"""Of one prompt. All their orders are tried, which takes 2 ** MOST_TEXTS steps."""
MOST_LETTERS = 400
"""Of one prompt, spaces aside. No picture holds more that could be read."""

ALIKE = str.maketrans(
    dict.fromkeys("‘’‚‛′ʹʼ`´", "'")
    | dict.fromkeys("“”„‟″〝〞〟«»", '"')
    | dict.fromkeys("‐‑‒–—―−⁃﹘", "-")
    | {"⁄": "/"}
)
"""Characters that mean the same and look nearly so. No reader tells them apart."""

_INCH = r"(?<=[\d½¼¾⅓⅔⅛⅜⅝⅞])"
_NO_INCH = rf"""(?! {_INCH} | (?<=\d\s)["”]\s )"""  # neither in 12" nor in 12 " ruler
QUOTED = re.compile(
    rf"""
      {_NO_INCH} (?:
          ["＂] ( (?: [^"＂“”]
                   | {_INCH} " (?= [^"]* [^"\s\d] " (?: $ | [\s.,;:!?)] ) )   # "a 12" ruler", closed further on
                 )+ ) ["＂”]
        | " ([^"]+) "                            # with other quotation marks in it
        | ” ([^“”]+) ”
      )
    | “([^“”"]*[^\s“”"])["“”](?= $ | [\s.,;:!?)] )     # also where it is only half typographic
    | “([^“”]+)” | “([^“”"]+)["“]
    | „([^„“”"]+)[“”"]
    | «([^«»]+)» | »([^«»]+)« | ‹([^‹›]+)› | ›([^‹›]+)‹
    | 「([^「」]+)」 | 『([^『』]+)』 | 〝([^〝〞〟]+)[〞〟]
    """,
    re.VERBOSE,
)
"""Double quotation marks of any kind."""

SINGLE_QUOTED = re.compile(
    r"""
    (?<![\w'‘’]) ['‘‚] (?! \s | \d0s\b )         # neither in don't nor before 90s
    ( (?: [^'‘’]
        | (?<=\w) ['’] (?=\w)                    # don't
        | (?<=s) ['’] (?= \s [^'‘’]* [^'‘’\s] ['’](?!\w) )   # dogs', where it is closed further on
      ){2,} )                                    # rock 'n' roll quotes nothing
    (?<!\s) ['’‘] (?!\w)
    """,
    re.VERBOSE,
)

_PLACE = (
    r"\W*(?:and\s+|is\s+)?(?:(?:right|directly|just)\s+)?(?:{})(?:\s+(?:the|a))?(?:\s+(?:words?|text|line|sign))?\W*"
)
IN_ORDER = re.compile(_PLACE.format("above|over|on top of|(?:to the )?left of|before|then|followed by"), re.IGNORECASE)
REVERSED = re.compile(_PLACE.format("below|under|underneath|beneath|(?:to the )?right of|after"), re.IGNORECASE)


def wanted_texts(prompt: str, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts that the picture must show, in whatever order; texts with a stated order are one.

    They are "text" in the metadata, one or a list of them, else what the prompt has in quotation marks: double ones of
    any kind, else single ones. Marks of inches and feet, and apostrophes, are none. `"A" above "B"` states an order,
    `"A" and "B"` does not. Raises UserError, naming the prompt, where there is none, or too much.
    """
    given = metadata.get("text")
    texts = quoted(prompt) if given is None else [given] if isinstance(given, str) else given
    if not _are_texts(texts):
        raise UserError(
            f"The reward 'ocr' does not know what text to read for the prompt {shown(repr(prompt))}: put it in double"
            ' quotes, or in the metadata as "text".'
        )
    letters = sum(len(normal(text)) for text in texts)
    if len(texts) > MOST_TEXTS or letters > MOST_LETTERS:
        raise UserError(
            f"The prompt {shown(repr(prompt))} asks for {len(texts)} texts of {letters} letters: the reward 'ocr' reads"
            f" at most {MOST_TEXTS} texts and {MOST_LETTERS} letters."
        )
    return tuple(texts)


def _are_texts(texts: Any) -> bool:
    return isinstance(texts, list | tuple) and bool(texts) and all(isinstance(t, str) and normal(t) for t in texts)


def quoted(prompt: str) -> list[str]:
    """What the prompt has in quotation marks; texts of which it says the order are joined."""
    found = [mark for mark in QUOTED.finditer(prompt) if _content(mark).strip()] or list(SINGLE_QUOTED.finditer(prompt))
    texts: list[list[str]] = []
    end = 0
    for mark in found:
        between, text = prompt[end : mark.start()], _content(mark).strip()
        if texts and IN_ORDER.fullmatch(between):
            texts[-1].append(text)
        elif texts and REVERSED.fullmatch(between):
            texts[-1].insert(0, text)
        else:
            texts.append([text])
        end = mark.end()
    return [" ".join(parts) for parts in texts]


def _content(mark: re.Match[str]) -> str:
    return next(group for group in mark.groups() if group is not None)


def likeness(found: str, wanted: Sequence[str]) -> float:
    """1 for the wanted texts, in any order, and nothing else; down to 0 for as many errors as they have letters."""
    texts = [normal(text) for text in wanted]
    return max(0.0, 1 - edit_distance(normal(found), texts) / sum(map(len, texts)))


def normal(text: str) -> str:
    """Without what does not count: case, spaces, and in which of several ways Unicode writes the same character."""
    text = unicodedata.normalize("NFKC", text.translate(ALIKE)).casefold()
    text = unicodedata.normalize("NFKC", text).translate(ALIKE)
    return "".join(c for c in text if not (c.isspace() or unicodedata.category(c) == "Cf" or "\ufe00" <= c <= "\ufe0f"))


def readable(characters: Iterable[str]) -> frozenset[str]:
    """What a text may consist of, in its `normal` form, for a reader with these characters.

    Only a character's usual form counts: the mathematical sign alef does not make Hebrew readable.
    """
    usual = {c for c in characters if len(c) == 1 and unicodedata.normalize("NFKC", c) == c}
    return frozenset("".join(map(normal, usual)))


def unreadable(texts: Sequence[str], letters: frozenset[str]) -> list[str]:
    """The characters of the texts that `readable` does not name, each once."""
    characters = unicodedata.normalize("NFKC", "".join(texts).translate(ALIKE))
    return [c for c in dict.fromkeys(characters) if not letters.issuperset(normal(c))]


def edit_distance(found: str, texts: Sequence[str]) -> int:
    """Levenshtein's, to several texts in any order: the least number of letters to insert, delete or replace.

    A row holds, for each i, the cost of turning the first i letters of `found` into some of the texts, one after the
    other; which, are the bits of the row's number. The row of none is that of deleting them.
    """
    rows = [list(range(len(found) + 1))]
    for done in range(1, 2 ** len(texts)):
        ways = [_after(rows[done ^ 1 << n], found, text) for n, text in enumerate(texts) if done >> n & 1]
        rows.append([min(costs) for costs in zip(*ways, strict=True)])
    return rows[-1][-1]


def _after(row: list[int], found: str, text: str) -> list[int]:
    """The row in which `text`, too, has been written."""
    for letter in text:
        new = [row[0] + 1]
        for i, other in enumerate(found, start=1):
            new.append(min(row[i] + 1, new[-1] + 1, row[i - 1] + (letter != other)))
        row = new
    return row
