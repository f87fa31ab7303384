"""What `remote` and `serve` send each other: images as one safetensors file, scores as JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import parse_json

PATH = "/score"
KIND = "application/octet-stream"
"""Content type of a request. A web page of another origin cannot send it without being asked for permission first."""


class Request(NamedTuple):
    """images float32 [B, 3, H, W] in [0, 1], whole 255ths; B prompts and B metadata."""

    images: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]


def pack(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> bytes:
    """The body of a request: "images" uint8 [B, 3, H, W], rounded; prompts and metadata as JSON in the header.

    Raises TypeError for metadata that JSON cannot hold.
    """
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous()
    header = {"prompts": json.dumps(list(prompts)), "metadata": json.dumps([dict(facts) for facts in metadata])}
    return save({"images": pixels}, header)


def unpack(body: bytes) -> Request:
    """What `pack` packed. Raises ValueError, with one sentence, for anything else."""
    try:
        pixels = load(body).get("images")
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        raise ValueError("The body is not a safetensors file.") from None
    if pixels is None or pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel():
        raise ValueError('The body must hold one tensor "images", uint8 [B, 3, H, W], with at least one image.')
    prompts, metadata = _facts(body, "prompts", str), _facts(body, "metadata", dict)
    if len(prompts) != len(pixels) or len(metadata) != len(pixels):
        raise ValueError(f"There are {len(pixels)} images, {len(prompts)} prompts and {len(metadata)} metadata.")
    return Request(pixels.float() / 255, prompts, metadata)


def _facts(body: bytes, name: str, kind: type) -> list[Any]:
    """The list of the header's metadata under `name`. safetensors itself reads metadata from files only."""
    size = int.from_bytes(body[:8], "little")
    try:
        header = parse_json(body[8 : 8 + size], "The header")
        facts = parse_json(header["__metadata__"][name], "The header")
    except (UserError, KeyError, TypeError):
        facts = None
    if not isinstance(facts, list) or not all(isinstance(item, kind) for item in facts):
        what = "texts" if kind is str else "objects"
        raise ValueError(f'The metadata of the safetensors body must hold "{name}", a JSON list of {what}.')
    return facts
