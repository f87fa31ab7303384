"""OCR: is the text that the prompt quotes in the picture, and spelt right?"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dgpo_core.errors import UserError
from dgpo_core.pictures import to_pil
from dgpo_core.prompts import Prompt
from dgpo_core.rewards.base import Reward, need_packages

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class Ocr(Reward):
    """max(0, 1 - edit distance / length), of the text that is read and the text that was asked for.

    What was asked for is "text" in the prompt's metadata, else all that the prompt has in double quotes. Case and
    spaces do not count. All text in the picture counts: unlike in Flow-GRPO's reward, which forgives everything around
    a correct text, a picture full of text scores low.

    threads: of the CPU, at most; 0 is all. Reads about one image of 512 pixels per second on two cores.
    Sources: Flow-GRPO (https://arxiv.org/abs/2505.05470), https://github.com/RapidAI/RapidOCR; PP-OCR's models are in
    its wheel, nothing else is downloaded.
    """

    range = (0.0, 1.0)
    licence = "Apache-2.0"
    # with the models, about 50 MB
    packages: ClassVar[Mapping[str, str]] = {
        "rapidocr": "rapidocr",
        "onnxruntime": "onnxruntime",
    }

    shareable = ("threads",)

    def __init__(self, device: str = "cpu", threads: int = 0) -> None:
        super().__init__(device)
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
            raise UserError(f"The threads of the reward 'ocr' must be a whole number of at least 0, not {threads!r}.")
        self.read = _reader(threads)

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            wanted_text(prompt.text, prompt.metadata)

    def overlaps(self, device: torch.device, group_size: int) -> bool:
        return device.type != "cpu"  # where it would take the cores from the policy

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        wanted = [wanted_text(prompt, facts) for prompt, facts in zip(prompts, metadata, strict=True)]
        found = [self.read(np.asarray(to_pil(image))) for image in images]
        return torch.tensor([likeness(text, target) for text, target in zip(found, wanted, strict=True)])


def wanted_text(prompt: str, metadata: Mapping[str, Any]) -> str:
    """The text that the picture must show. Raises UserError where the prompt names none."""
    text = metadata.get("text")
    if text is None:
        text = " ".join(straight or curly for straight, curly in QUOTED.findall(prompt))
    if not isinstance(text, str) or not normal(text):
        raise UserError(
            f"The reward 'ocr' does not know what text to read for the prompt {prompt!r}: put it in double quotes, or"
            ' in the metadata as "text".'
        )
    return text


def likeness(found: str, wanted: str) -> float:
    """1 for the wanted text and nothing else, down to 0 for as many errors as it has letters."""
    found, wanted = normal(found), normal(wanted)
    return max(0.0, 1 - edit_distance(found, wanted) / len(wanted))


def normal(text: str) -> str:
    """Without what does not count: case and spaces."""
    return "".join(text.lower().split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the least number of inserted, deleted and replaced letters that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def _reader(threads: int) -> Any:
    """A function from a picture, uint8 [H, W, 3] RGB, to all the text in it, from the top left to the bottom right."""
    need_packages("ocr", Ocr.packages)
    from rapidocr import RapidOCR

    params: dict[str, Any] = {"Global.log_level": "error"}
    if threads:
        params["EngineConfig.onnxruntime.intra_op_num_threads"] = threads
    engine = RapidOCR(params=params)
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)  # it warns of every picture without text

    def read(picture: np.ndarray) -> str:
        lines = engine(picture[:, :, ::-1].copy(), use_cls=False).txts  # it expects OpenCV's BGR
        return " ".join(lines or ())

    return read
