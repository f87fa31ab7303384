"""GenEval: are the objects that the prompt names there, in the right number, colours and places?

Two rewards: what GenEval reports, and what DGPO's authors train on.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from dgpo_core.common.pictures import to_pil
from dgpo_core.common.prompts import Prompt
from dgpo_core.rewards.clip import Clip
from dgpo_core.rewards.geneval.detector import DETECTOR, Detector
from dgpo_core.rewards.geneval.rules import (
    COLORS,
    MAX_OBJECTS,
    THRESHOLD,
    ColorsOf,
    Detection,
    by_class,
    check_metadata,
    correct,
    training_score,
)
from dgpo_core.rewards.model import ModelReward
from dgpo_core.rewards.published import CLIP_L

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = (0x99, 0x99, 0x99)  # what GenEval puts in the place of the background


class _ByObjects(ModelReward):
    """Judges what a detector finds, and CLIP says the colours of, by GenEval's metadata."""

    name: ClassVar[str]
    licence = "MIT (GenEval, CLIP, Mask2Former's code); the detector's model card says: other"
    weights = (DETECTOR, CLIP_L)
    retired: ClassVar[Mapping[str, str]] = {
        "graded": "leave it out; 'geneval' is GenEval's 0 or 1, and 'geneval_training' the partial credit to train on"
    }

    def __init__(
        self, device: str = "cpu", detector: str = "", clip: str = "", dtype: str = "auto", batch: int = 8
    ) -> None:
        super().__init__(device, dtype, batch)
        self.detector = Detector(detector, self.name)
        self.clip = Clip(CLIP_L, clip, self.dtype, self.name)
        self.colors: dict[str, Tensor] = {}

    @staticmethod
    @abstractmethod
    def judge(objects: Mapping[str, Sequence[Detection]], metadata: Mapping[str, Any], colors_of: ColorsOf) -> float:
        """The score of a picture with these objects, by class."""

    def networks(self) -> Sequence[nn.Module]:
        return (self.detector.model, self.clip.model)

    def check(self, prompts: Sequence[Prompt]) -> None:
        classes = set(self.detector.labels.values())
        for prompt in prompts:
            check_metadata(prompt.text, prompt.metadata, classes)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        self.check([Prompt(text, facts) for text, facts in zip(prompts, metadata, strict=True)])
        return super().score(images, prompts, metadata)

    def score_batch(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        detections = self.detector(images, THRESHOLD)
        return torch.tensor([self._judge(*each) for each in zip(images, detections, metadata, strict=True)])

    def _judge(self, image: Tensor, detections: Sequence[Detection], metadata: Mapping[str, Any]) -> float:
        picture = to_pil(image)
        objects = by_class(detections, metadata["tag"])
        return float(self.judge(objects, metadata, lambda found, name: self.colors_of(picture, found, name)))

    def colors_of(self, picture: Image.Image, found: Sequence[Detection], name: str) -> list[str]:
        """The colour of each object of the class `name`: the one whose sentences CLIP finds closest to the crop."""
        crops = self.clip.images([crop(picture, detection) for detection in found])
        return [COLORS[index] for index in (crops @ self._color_embeddings(name).T).argmax(dim=1).tolist()]

    def _color_embeddings(self, name: str) -> Tensor:
        """Unit-length float32 [10, D]: per colour the mean over the templates, as zero-shot classifiers do."""
        if name not in self.colors:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            embeddings = self.clip.texts(texts).view(len(COLORS), len(TEMPLATES), -1)
            self.colors[name] = normalize(embeddings.mean(dim=1), dim=-1).cpu()
        return self.colors[name].to(self.clip.model.device)


class GenEval(_ByObjects):
    """What GenEval reports: 1 where the picture is right by its rules, else 0. Too many objects are mostly right.

    Every prompt needs GenEval's metadata: "tag", "include", "exclude" (see `check_metadata`).
    detector: folder or hub id of a transformers detection model on COCO; clip: of a CLIPModel for the colours.
    dtype: of CLIP; the detector is float32.
    Sources: https://github.com/djghosh13/geneval (rules, thresholds, colours), here without mmdet;
    https://huggingface.co/facebook/mask2former-swin-small-coco-instance.
    """

    name = "geneval"
    range = (0.0, 1.0)
    judge = staticmethod(correct)


class GenEvalTraining(_ByObjects):
    """What DGPO's authors train on for GenEval: partial credit, for exact counts (`training_score`); can be negative.

    1 is right by GenEval's rules, too, but not the other way round: two dogs for "a dog" are right there, and 0 here.
    Metadata and options are those of `GenEval`.
    """

    name = "geneval_training"
    range = (1.0 - (MAX_OBJECTS - 1), 1.0)
    judge = staticmethod(training_score)


def crop(picture: Image.Image, detection: Detection) -> Image.Image:
    """The object in its box, with what is not part of it greyed out if its mask is known."""
    if detection.mask is not None:
        mask = Image.fromarray(detection.mask.to(torch.uint8).mul(255).numpy())
        picture = Image.composite(picture, Image.new("RGB", picture.size, GREY), mask)
    left, top, right, bottom = (round(edge) for edge in detection.box)
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
