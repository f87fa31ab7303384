"""LoRAs as they flow along an edge (LORA_MODEL) and lie in ComfyUI's folders. Nothing here knows ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.policy.lora import file as lora_file

SUFFIXES = (".safetensors", ".sft")
_FORBIDDEN = re.compile(r'[\x00-\x1f:*?"<>|]')


class LoraModel(dict[str, Tensor]):
    """A LoRA's state dict, with the names of its file, and `metadata`, the strings of the file's header.

    Every node that takes a LORA_MODEL takes it. It is not changed once it is on an edge.
    """

    def __init__(self, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(state)
        self.metadata: dict[str, str] = {key: str(value) for key, value in (metadata or {}).items()}

    def __repr__(self) -> str:
        """In few words: ComfyUI keeps all inputs of a node that has failed as texts, and sends them to every page."""
        return f"LoraModel of {len(self)} tensors"


def read(path: str | Path) -> LoraModel:
    """The LoRA in a .safetensors file, each module's scale in its `.alpha`; UserError as `lora_file.load`."""
    check_kind(Path(path).name)
    return LoraModel(*lora_file.load(path))


def write(path: Path, lora: Mapping[str, Tensor], extra: Mapping[str, str]) -> None:
    """Writes a LoRA with its metadata and `extra`, whole or not at all.

    UserError where it is empty, holds numbers that cannot be, or has no room.
    """
    if not lora:
        raise UserError("The LORA_MODEL is empty, so there is nothing to save.")
    lora_file.refuse_unusable("to save", lora)
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in lora.items()}
    lora_file.write(path, tensors, {**getattr(lora, "metadata", {}), **extra})


def check_kind(name: str) -> None:
    """UserError for files other than safetensors: they can run code when they are read."""
    if not name.lower().endswith(SUFFIXES):
        raise UserError(f"The LoRA {name} is not a .safetensors file, and no other kind is read: convert it first.")


def check_name(name: str) -> str:
    """The name to save under, without a suffix and with "/"; UserError where it would lie outside its folder."""
    parts = name.strip().removesuffix(".safetensors").replace("\\", "/").split("/")
    if any(part != part.strip() or part.endswith(".") or not part or _FORBIDDEN.search(part) for part in parts):
        raise UserError(f"'{name}' is no name for a LoRA: write one such as dgpo/lora, within the output folder.")
    return "/".join(parts)


def parse_metadata(text: str) -> dict[str, str]:
    """The lines `key=value`; UserError for a line without "=" or key."""
    pairs = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise UserError(f"The metadata line {line!r} is not of the form key=value.")
        pairs[key.strip()] = value.strip()
    return pairs


def next_name(folders: Iterable[str | Path], stem: str) -> str:
    """`<stem>_00001.safetensors`, with the number after the highest that is in any of the folders."""
    pattern = re.compile(rf"{re.escape(stem)}_(\d+)(?:\..*)?", re.IGNORECASE)
    names = [file.name for folder in map(Path, folders) if folder.is_dir() for file in folder.iterdir()]
    taken = [int(found[1]) for found in map(pattern.fullmatch, names) if found]
    return f"{stem}_{max(taken, default=0) + 1:05d}.safetensors"
