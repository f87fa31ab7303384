"""Object detection by transformers: DETR and its kin (boxes) and Mask2Former (boxes and masks)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForUniversalSegmentation,
)

from dgpo_core.common.errors import UserError
from dgpo_core.common.pictures import to_pil
from dgpo_core.rewards.geneval.rules import Detection
from dgpo_core.rewards.weight_files import Weights, load_helper, load_network

DETECTOR = Weights("facebook/mask2former-swin-small-coco-instance", "275 MB", option="detector")
MASKED = ("mask2former",)
"""Types of models that give masks; all others must give boxes."""
EDGES = (800, 1333)  # pixels: shorter edge, and the most that the longer may have (COCO's usual test size)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet

ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""What COCO, and some detectors trained on it, call the classes of GenEval."""


class Detector:
    """A detection model on COCO's classes, under GenEval's names. Computes in float32: its scores meet thresholds.

    given: what the reward's option says, a folder or hub id. The default is the model that GenEval uses, Mask2Former
    with Swin-S on COCO instances (https://huggingface.co/facebook/mask2former-swin-small-coco-instance), on images of
    GenEval's size. Any transformers model for object detection works, but its scores may not mean the same.
    """

    def __init__(self, given: str, reward: str) -> None:
        self.masked = load_helper(AutoConfig, DETECTOR, given, reward).model_type in MASKED
        kind = AutoModelForUniversalSegmentation if self.masked else AutoModelForObjectDetection
        self.model = load_network(kind, DETECTOR, given, reward).float()
        self.processor: Any = None if self.masked else load_helper(AutoImageProcessor, DETECTOR, given, reward)
        names: dict[int, str] = self.model.config.id2label
        self.labels = {index: ALIASES.get(name.lower(), name.lower()) for index, name in names.items()}
        if "person" not in self.labels.values():
            raise UserError(
                f"Reward {reward!r}: the detector {given or DETECTOR} was not trained on the classes of COCO."
            )

    def __call__(self, images: Tensor, threshold: float) -> list[list[Detection]]:
        """images float [B, 3, H, W] in [0, 1] -> for each, the detections with a score above `threshold`."""
        if self.masked:
            return self._masks(images, threshold)
        return self._boxes(images, threshold)

    def _boxes(self, images: Tensor, threshold: float) -> list[list[Detection]]:
        height, width = images.shape[-2:]
        size = height, width
        inputs = self.processor([to_pil(image) for image in images], return_tensors="pt").to(self.model.device)
        by_image = self.processor.post_process_object_detection(
            self.model(**inputs), threshold=threshold, target_sizes=[size] * len(images)
        )
        return [
            [
                Detection(self.labels[int(label)], float(score), _inside(box.tolist(), size))
                for score, label, box in zip(each["scores"], each["labels"], each["boxes"], strict=True)
            ]
            for each in by_image
        ]

    def _masks(self, images: Tensor, threshold: float) -> list[list[Detection]]:
        pixels = _resized(images.to(self.model.device).float())
        out = self.model(pixel_values=pixels)
        size = images.shape[-2:]
        return [
            self._of_image(*each, size, threshold)
            for each in zip(out.class_queries_logits, out.masks_queries_logits, strict=True)
        ]

    def _of_image(self, classes: Tensor, masks: Tensor, size: torch.Size, threshold: float) -> list[Detection]:
        """Mask2Former's instances: a query's score is its class's probability times the mean of its mask's.

        classes [Q, C + 1] logits, the last of "nothing"; masks [Q, h, w] logits. Source: Mask2Former,
        `instance_inference`; boxes are the masks' bounds, as in mmdet.
        """
        scores = classes.softmax(dim=-1)[:, :-1]
        best, places = scores.flatten().topk(min(len(classes), scores.numel()))
        places = places[best > threshold]
        instances = []
        for place in places.tolist():
            query, label = divmod(place, scores.shape[1])
            logits = interpolate(masks[None, None, query], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
            mask = logits > 0
            score = float(scores[query, label] * logits.sigmoid()[mask].mean()) if mask.any() else 0.0
            if score > threshold:
                instances.append(Detection(self.labels[label], score, _bounds(mask), mask.cpu()))
        return instances


def _resized(images: Tensor) -> Tensor:
    """As the detector was tested on COCO: the shorter edge at 800 pixels, normalised; edges rounded to whole 32s."""
    height, width = images.shape[-2:]
    zoom = min(EDGES[0] / min(height, width), EDGES[1] / max(height, width))
    size = tuple(32 * max(1, round(edge * zoom / 32)) for edge in (height, width))
    images = interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


def _bounds(mask: Tensor) -> tuple[float, float, float, float]:
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _inside(box: list[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    height, width = size
    return max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)
