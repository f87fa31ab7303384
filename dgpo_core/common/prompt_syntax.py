"""What other programs read in a prompt and this one does not: one table, and one warning.

Every prompt goes to the text encoder as it stands. Weights, LoRA tags, wildcards and the like would be trained on as
words, so whoever writes them is told once, before the first image. What is to be interpreted here one day leaves the
table.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dgpo_core.common.reading import shown


class Written(Protocol):
    """A prompt, and the file and line that it is from ("" for none)."""

    @property
    def text(self) -> str: ...

    @property
    def where(self) -> str: ...


@dataclass(frozen=True)
class Syntax:
    """name: in the plural. pattern: finds one, in time that grows with the text alone; none is where no sign of it is.

    quoted: whether it also counts inside of "quotes", where a prompt says what is written in the picture.
    comfyui: whether ComfyUI's own text encoders interpret it, and so the native policy.
    """

    name: str
    pattern: re.Pattern[str]
    signs: tuple[str, ...]
    quoted: bool = True
    comfyui: bool = False

    def find(self, text: str) -> str:
        """The first one in a text; "" for none."""
        if not any(sign in text for sign in self.signs):
            return ""
        found = self.pattern.search(text if self.quoted else _QUOTES.sub('""', text))
        return found[0].strip() if found else ""


_QUOTES = re.compile(r'"[^"\n]{0,500}"|“[^”\n]{0,500}”')
PYTHON_NAMES = (
    "init|main|name|call|new|del|str|repr|file|all|doc|dict|class|len|iter|next|enter|exit|getitem|setitem|version"
)
_LORA = "lora|lyco|locon|hypernet|hypernetwork|ti|embedding"
_WILDCARD = re.compile(rf"(?<!\w)__(?!(?:{PYTHON_NAMES})__)[^\W_][\w\-/*.]{{0,80}}?__(?!\w)")
_ALTERNATIVES = re.compile(r"\{[^{}|]{0,2000}\|[^{}]{0,2000}\}")

SYNTAXES: tuple[Syntax, ...] = (
    Syntax(
        "weights",  # (word:1.2), ((word)), (word)1.2, (word)++; not (16:9), (cat :3), (a dog)
        re.compile(
            r"(?<!\\)\([^()]{0,500}?(?:[^()\d\s:]:\s*\d+(?:\.\d+)?|:\s*\d*\.\d+)\s*\)"
            r"|(?<![\\\w])\(\([^()]{1,500}\)\)"
            r"|(?<!\\)\([^()]{1,500}\)(?:\d?\.\d+|\+{1,5})"
        ),
        signs=("(",),
        comfyui=True,
    ),
    Syntax(
        "LoRA tags",
        re.compile(rf"<(?:{_LORA}):[^<>]{{0,200}}>", re.IGNORECASE),
        signs=("<",),
    ),
    Syntax(
        "tokens in angle brackets",
        re.compile(rf"(?<!\w)<(?!(?:{_LORA}):)[^\W\d_][\w\-/]{{0,80}}(?::[^<>]{{0,200}})?>", re.IGNORECASE),
        signs=("<",),
    ),
    Syntax("embeddings", re.compile(r"(?<!\w)embedding:[\w\-./\\]+", re.IGNORECASE), signs=(":",), comfyui=True),
    Syntax("alternatives", _ALTERNATIVES, signs=("{",)),
    Syntax("wildcards", _WILDCARD, signs=("__",)),
    Syntax(
        "square brackets",  # [word], [a:b:0.5], [a|b]; not [1], list[x], ["a"]
        re.compile(r"(?<![\\\w\]])\[(?=[^\[\]]{0,500}[^\W\d_])[^\[\]\"'{}\n]{1,500}\]"),
        signs=("[",),
    ),
    Syntax(
        "BREAK and AND",
        re.compile(r"(?<![\w'\-])(?:BREAK|(?<=\s)AND(?=\s))(?![\w'\-])"),
        signs=("BREAK", "AND"),
        quoted=False,
    ),
    Syntax(
        "flags",
        re.compile(r"(?<!\S)--(?:ar|aspect|v|s|q|no|style|stylize|seed|niji|chaos|tile|iw)(?=\s)"),
        signs=("--",),
    ),
)
"""What is warned of. The patterns leave alone what people write as a text: emoticons, f(x), (a dog), times, JSON."""


NEGATIVE = "Negative prompt:"
_SETTINGS = re.compile(
    r"\s*Steps: ?\d+, *(?:Sampler|Schedule type|CFG scale|Seed|Size|Model|Model hash|Clip skip)\b.*|\s*Steps: ?\d+\s*"
)


def is_infotext_line(line: str) -> bool:
    """Whether a line can only be a part of generation data as A1111's web UI and its kind write them, and no prompt."""
    return line.lstrip().lower().startswith(NEGATIVE.lower()) or bool(_SETTINGS.fullmatch(line))


def is_template(text: str) -> bool:
    """Whether a text stands for many, one of which is drawn by chance: {a|b}, __wildcard__."""
    return bool(_ALTERNATIVES.search(text) or _WILDCARD.search(text))


def syntax_warning(prompts: Sequence[Written], by_comfyui: bool = False) -> str:
    """One sentence about all that will be taken as words in these prompts; "" where there is nothing.

    by_comfyui: the prompts go through ComfyUI's own text encoders, which interpret some of it.
    """
    syntaxes = [syntax for syntax in SYNTAXES if not (by_comfyui and syntax.comfyui)]
    warned_of = [(prompt, seen) for prompt in prompts if (seen := _examples(syntaxes, prompt.text))]
    if not warned_of:
        return ""
    first = warned_of[0][0].where
    examples = {name: example for _, seen in reversed(warned_of) for name, example in seen.items()}  # the first of each
    listed = ", ".join(f"{s.name} such as {shown(examples[s.name], 60)}" for s in syntaxes if s.name in examples)
    return (
        f"{len(warned_of)} of {len(prompts)} prompts{f', the first in {shown(first)},' if first else ''} hold what"
        f" other programs interpret; here it is taken as words: {listed}."
    )


def _examples(syntaxes: Sequence[Syntax], text: str) -> dict[str, str]:
    """What is found in one prompt, by the syntax's name; words in capitals say nothing where all is in capitals."""
    examples = {syntax.name: syntax.find(text) for syntax in syntaxes if syntax.quoted or not text.isupper()}
    return {name: example for name, example in examples.items() if example}
