"""OCR: is the text that the prompt quotes in the picture, and spelt right?"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.pictures import to_pil
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.reading import shown
from dgpo_core.rewards.base import Reward, need_packages
from dgpo_core.rewards.ocr.reader import Reader
from dgpo_core.rewards.ocr.text import likeness, readable, unreadable, wanted_texts


class Ocr(Reward):
    """max(0, 1 - edit distance / length), of the text that is read and the text that was asked for (`wanted_texts`).

    Case, spaces, and forms of one character do not count, nor does the order of several texts unless the prompt states
    one. All text in the picture counts: unlike in Flow-GRPO's reward, which forgives everything around a correct text,
    a picture full of text scores low. A prompt with characters that the reader does not have is refused.

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
        need_packages("ocr", self.packages)
        self.read = Reader(threads)
        self.letters = readable(self.read.characters)

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self._wanted(prompt.text, prompt.metadata)

    def overlaps(self, device: torch.device, group_size: int) -> bool:
        return device.type != "cpu"  # where it would take the cores from the policy

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        wanted = [self._wanted(*each) for each in zip(prompts, metadata, strict=True)]
        found = [self.read(np.asarray(to_pil(image))) for image in images]
        return torch.tensor(
            [max(likeness(text, texts) for text in orders) for orders, texts in zip(found, wanted, strict=True)]
        )

    def _wanted(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        texts = wanted_texts(prompt, metadata)
        unknown = unreadable(texts, self.letters)
        if unknown:
            raise UserError(
                f"The reward 'ocr' cannot read {shown(' '.join(unknown), 40)} in the prompt {shown(repr(prompt))}: its"
                " reader has no such characters, so no picture could be right; leave the prompt out."
            )
        return texts
