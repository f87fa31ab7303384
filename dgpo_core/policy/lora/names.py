"""The modules of a diffusers network under the names that other trainers give them.

kohya's scripts, ComfyUI's trainer and others name a module as the checkpoint of its makers does, where q, k and v are
one weight. diffusers' own converters know the published size of Flux alone and nothing of SD3; here each family says in
its file how its makers' names are read off the network itself, so that they hold for every size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown
from dgpo_core.policy.lora import keys as lora_keys
from dgpo_core.policy.lora.file import LoraFile


@dataclass(frozen=True)
class Place:
    """Where a weight of another naming lies: in the rows of these modules, one after the other.

    swapped: its two halves are the other way round (the shift and scale of a last norm).
    """

    modules: tuple[str, ...]
    swapped: bool = False


MakersNames = Callable[[Any, Mapping[str, nn.Module]], Iterable[tuple[str, Place]]]
"""From a network and those of its modules that can carry a LoRA, by name: the makers' names, each with its place."""


def of_blocks(
    network: nn.Module, theirs: str, ours: str, block: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, Place]]:
    """The makers' names in a list of blocks, which are alike. theirs, ours: what they and we call the list; block: in
    one of them, by their name for a weight, our modules for it."""
    for i in range(len(getattr(network, ours))):
        for name, modules in block.items():
            yield f"{theirs}.{i}.{name}", Place(tuple(f"{ours}.{i}.{module}" for module in modules))


def resolve(lora: LoraFile, network: nn.Module, makers_names: MakersNames) -> LoraFile:
    """The LoRA under the names of the network's own modules, fused ones taken apart.

    makers_names: of the network's family, `Family.makers_names`. Raises UserError where it is for another
    model, as a whole or in part.
    """
    places = _places(network, makers_names)
    resolved: dict[str, tuple[Tensor, Tensor]] = {}
    strange = [name for name in lora.weights if _flat(lora_keys.bare(name)) not in places]
    if len(strange) == len(lora.weights):
        raise UserError(f"The LoRA {shown(lora.path)} is for another model: no layer of this one has the names in it.")
    if strange:
        raise UserError(
            f"The LoRA {shown(lora.path)} changes {shown(strange[0])}, which this model lacks: give one of this model."
        )
    for name, pair in lora.weights.items():
        for module, part in _taken_apart(lora, name, pair, places[_flat(lora_keys.bare(name))], network):
            if module in resolved:
                raise UserError(
                    f"The LoRA {shown(lora.path)} changes {module} twice, under two names: give one with one of them."
                )
            resolved[module] = part
    return replace(lora, weights=resolved)


def _taken_apart(
    lora: LoraFile, name: str, pair: tuple[Tensor, Tensor], place: Place, network: nn.Module
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Each module with its A and its rows of B."""
    a, b = pair
    if len(place.modules) == 1:
        yield place.modules[0], (a, torch.cat(b.chunk(2)[::-1]) if place.swapped else b)
        return
    rows = [_rows(network.get_submodule(module)) for module in place.modules]
    if sum(rows) != b.shape[0]:
        raise UserError(
            f"The LoRA {shown(lora.path)} does not fit: {shown(name)} has {sum(rows)} rows in the model and"
            f" {b.shape[0]} in the file."
        )
    yield from ((module, (a, part)) for module, part in zip(place.modules, b.split(rows), strict=True))


def _rows(module: nn.Module) -> int:
    layer: Any = module  # a Linear or a convolution
    return layer.out_features if hasattr(layer, "out_features") else layer.out_channels


def _flat(name: str) -> str:
    """kohya's way to write it."""
    return name.replace(".", "_")


def _places(network: nn.Module, makers_names: MakersNames) -> Mapping[str, Place]:
    """From every known name of a module, flat, to where it is: its own name before all."""
    own = {
        name: module
        for name, module in network.named_modules()
        if hasattr(module, "weight") and (hasattr(module, "out_features") or hasattr(module, "out_channels"))
        and not name.endswith(".base_layer")  # of a module that has an adapter
        and ".lora_" not in name
    }  # fmt: skip
    places = {_flat(name): Place((name,)) for name in own}
    # diffusers' first files called it without the number
    places |= {_flat(name.removesuffix(".0")): Place((name,)) for name in own if name.endswith(".to_out.0")}
    for name, place in makers_names(network, own):
        if all(module in own for module in place.modules):
            places.setdefault(_flat(name), place)
    return places
