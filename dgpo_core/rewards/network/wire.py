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
SOURCE = "source_"
"""What the names of the tensors of sources begin with."""
KIND = "application/octet-stream"
"""Content type of a request. A web page of another origin cannot send it without being asked for permission first."""


class Request(NamedTuple):
    """images float32 [B, 3, H, W] in [0, 1], whole 255ths; B prompts and B metadata; of each image the pictures that it
    was made from, float32 [3, h, w] likewise."""

    images: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]
    sources: list[list[Tensor]]


def pack(
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    sources: Sequence[Sequence[Tensor]] = (),
) -> bytes:
    """The body of a request: "images" uint8 [B, 3, H, W], rounded; prompts and metadata as JSON in the header.

    Each source is one tensor, "source_0" and so on, [3, h, w], and the header says which images have which; without any
    nothing is said of them. Raises TypeError for metadata that JSON cannot hold.
    """
    header = {"prompts": json.dumps(list(prompts)), "metadata": json.dumps([dict(facts) for facts in metadata])}
    distinct = {id(source): source for of in sources for source in of}
    if distinct:
        places = {key: i for i, key in enumerate(distinct)}
        header["sources"] = json.dumps([[places[id(source)] for source in of] for of in sources])
    tensors = {f"{SOURCE}{i}": _bytes(source) for i, source in enumerate(distinct.values())}
    return save({"images": _bytes(images), **tensors}, header)


def _bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous()


def unpack(body: bytes) -> Request:
    """What `pack` packed. Raises ValueError, with one sentence, for anything else."""
    try:
        tensors = load(body)
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        raise ValueError("The body is not a safetensors file.") from None
    pixels = tensors.get("images")
    if pixels is None or pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel():
        raise ValueError('The body must hold one tensor "images", uint8 [B, 3, H, W], with at least one image.')
    prompts, metadata = _facts(body, "prompts", str), _facts(body, "metadata", dict)
    if len(prompts) != len(pixels) or len(metadata) != len(pixels):
        raise ValueError(f"There are {len(pixels)} images, {len(prompts)} prompts and {len(metadata)} metadata.")
    return Request(pixels.float() / 255, prompts, metadata, _sources(body, tensors, len(pixels)))


def _sources(body: bytes, tensors: Mapping[str, Tensor], count: int) -> list[list[Tensor]]:
    """Of each image its sources, as the header says."""
    if not any(name.startswith(SOURCE) for name in tensors):
        return [[] for _ in range(count)]
    places = _facts(body, "sources", list)
    names = [[f"{SOURCE}{place}" for place in of] for of in places]
    known = all(name in tensors for of in names for name in of)
    found = [tensor for name, tensor in tensors.items() if name.startswith(SOURCE)]
    right = all(t.dtype == torch.uint8 and t.ndim == 3 and t.shape[0] == 3 and t.numel() for t in found)
    if len(places) != count or not known or not right:
        raise ValueError('"sources" must hold a list for each image, of the numbers of tensors uint8 [3, h, w].')
    pictures = {name: tensors[name].float() / 255 for of in names for name in of}
    return [[pictures[name] for name in of] for of in names]


def _facts(body: bytes, name: str, kind: type) -> list[Any]:
    """The list of the header's metadata under `name`. safetensors itself reads metadata from files only."""
    size = int.from_bytes(body[:8], "little")
    try:
        header = parse_json(body[8 : 8 + size], "The header")
        facts = parse_json(header["__metadata__"][name], "The header")
    except (UserError, KeyError, TypeError):
        facts = None
    if not isinstance(facts, list) or not all(isinstance(item, kind) for item in facts):
        kinds: dict[type, str] = {str: "texts", dict: "objects", list: "lists"}
        raise ValueError(f'The metadata of the safetensors body must hold "{name}", a JSON list of {kinds[kind]}.')
    return facts
