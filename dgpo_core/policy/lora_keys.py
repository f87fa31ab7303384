"""What a LoRA of any trainer changes: its modules, which weights of a model they are for, and what its header says.

A *key map* is what ComfyUI makes of a model: from the names that LoRA files use to the model's own weights. A target is
the weight's key, `(key, (dim, start, length))` for a part of a fused weight, or `(key, None, function)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Size, Tensor

Target = str | tuple[Any, ...]

_PART = re.compile(
    r"(?P<module>.+?)(?:[._]lora\.(?:up|down)\.weight|\.lora_linear_layer\.(?:up|down)\.weight"
    r"|\.lora_(?:A|B|up|down|mid)(?:\.default)?(?:\.weight|\.bias)?|\.(?:lokr|hada)_\w+|\.[ab][12]\.weight"
    r"|\.(?:alpha|dora_scale|diff|diff_b|set_weight|reshape_weight|w_norm|b_norm|oft_blocks|rescale))"
)
_FIRST = (".lora_A", ".lora_down.", "lora.down.", ".lora_linear_layer.down.")
_SECOND = (".lora_B", ".lora_up.", "lora.up.", ".lora_linear_layer.up.")
_OTHER_SHAPE = (".reshape_weight", ".lora_mid.weight", ".bias")
_PREFIXES = ("base_model.model.", "unet.", "transformer.", "diffusion_model.")
_TEXT_ENCODERS = ("lora_te", "lora_prior_te", "text_encoder", "text_model.")


@dataclass(frozen=True)
class Matches:
    """The modules of a LoRA, by what can be done with them.

    targets: those that fit, with their weights; missing: those that the model does not have; misfits: those that it has
    with other shapes.
    """

    targets: Mapping[str, Target]
    missing: tuple[str, ...]
    misfits: tuple[str, ...]

    @property
    def total(self) -> int:
        """How many modules the LoRA has."""
        return len(self.targets) + len(self.missing) + len(self.misfits)


def modules(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a LoRA by the module that they belong to; a name in no known form loses its last part."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _PART.fullmatch(key)
        grouped.setdefault(match["module"] if match else key.rpartition(".")[0] or key, {})[key] = tensor
    return grouped


def low_rank(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """A [r, in] and B [out, r] of one module's tensors, float32, with alpha / r in B; None for other kinds."""
    alpha = next((float(t) for key, t in parts.items() if key.endswith(".alpha")), None)
    first, second = ([t for key, t in parts.items() if any(m in key for m in marks)] for marks in (_FIRST, _SECOND))
    known = len(first) + len(second) + (alpha is not None)
    if not (len(first) == len(second) == 1 and known == len(parts)):
        return None
    a, b = (t.float().flatten(1) if t.shape[2:].numel() == 1 else t.float() for t in (*first, *second))
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        return None
    return a, b if alpha is None else b * (alpha / a.shape[0])


def match(state: Mapping[str, Tensor], key_map: Mapping[str, Target], shapes: Mapping[str, Size]) -> Matches:
    """Finds each module's weight: under its own name, else under another that diffusers' names are known by.

    shapes: of the model's weights, for those whose shape tells (a packed one's does not).
    """
    targets, missing, misfits = {}, [], []
    for module, parts in modules(state).items():
        name = next((n for n in _names(module) if n in key_map), None)
        if name is None:
            missing.append(module)
        elif not _fits(parts, _shape(key_map[name], shapes)):
            misfits.append(module)
        else:
            targets[module] = key_map[name]
    return Matches(targets, tuple(missing), tuple(misfits))


def without(state: Mapping[str, Tensor], left_out: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of all modules but these."""
    names = set(left_out)
    return {key: t for module, parts in modules(state).items() if module not in names for key, t in parts.items()}


def of_text_encoder(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the modules that are a text encoder's."""
    return tuple(name for name in names if name.startswith(_TEXT_ENCODERS))


def made_for(metadata: Mapping[str, str]) -> str:
    """The base model that a LoRA's header names, "" where it names none."""
    architecture = metadata.get("modelspec.architecture", "").removesuffix("/lora")
    return metadata.get("ss_base_model_version") or architecture or metadata.get("dgpo.base", "")


def summary(metadata: Mapping[str, str]) -> str:
    """What a LoRA's header says of its training, in one line; "" where it says nothing."""
    own = [f"{what} {metadata[f'dgpo.{what}']}" for what in ("step", "rewards", "base") if f"dgpo.{what}" in metadata]
    said = [f"DGPO {', '.join(own)}"] if own else []
    if made_for(metadata):
        said.append(f"made for {made_for(metadata)}")
    if metadata.get("ss_network_dim"):
        said.append(f"rank {metadata['ss_network_dim']}")
    return ", ".join(said)


def report(found: Matches, applied: int, metadata: Mapping[str, str], with_clip: bool) -> str:
    """One line: how many modules were applied, what became of the others, and what the header says."""
    text = () if with_clip else of_text_encoder(found.missing)
    missing = [name for name in found.missing if name not in set(text)]
    unused = len(found.targets) - applied
    reasons = [
        f"{len(text)} of the text encoder left out: no CLIP is connected" if text else "",
        f"{len(missing)} not in this model, such as {missing[0]}" if missing else "",
        f"{len(found.misfits)} of other shapes than this model's, such as {found.misfits[0]}" if found.misfits else "",
        f"{unused} in a form that ComfyUI does not know" if unused else "",
    ]
    head = "; ".join([f"{applied} of {found.total} modules applied", *filter(None, reasons)])
    return "; ".join(filter(None, [head, summary(metadata)]))


def nothing_fits(name: str, found: Matches, metadata: Mapping[str, str], with_clip: bool) -> str:
    """The sentence for a LoRA of which nothing could be applied."""
    if not with_clip and len(of_text_encoder(found.missing)) == found.total:
        return f"The LoRA {name} changes only the text encoder: connect a CLIP."
    if found.targets:
        return f"The LoRA {name} is in a form that ComfyUI does not know: convert it, or give another."
    base = made_for(metadata)
    return f"The LoRA {name} has no layer of this model: it was made for {base or 'another one'}."


def _names(module: str) -> Iterator[str]:
    """The names that a module may have in a key map: its own, then those of a diffusers module called so."""
    yield module
    bare = module.replace(".processor.", ".")
    while bare.startswith(_PREFIXES):
        bare = bare.split(".", 2)[2] if bare.startswith("base_model.model.") else bare.split(".", 1)[1]
    flat = bare.replace(".", "_")
    yield from (f"lora_unet_{flat}", f"transformer.{bare}", f"lora_transformer_{flat}", f"diffusion_model.{bare}")


def _shape(target: Target, shapes: Mapping[str, Size]) -> tuple[int, ...] | None:
    """The shape of the weight, or of the part of it, that a target means; None where it is not known."""
    key = target if isinstance(target, str) else target[0]
    if key not in shapes:
        return None
    shape = list(shapes[key])
    if not isinstance(target, str) and target[1] is not None:
        dim, _, length = target[1]
        shape[dim] = length
    return tuple(shape)


def _fits(parts: Mapping[str, Tensor], shape: tuple[int, ...] | None) -> bool:
    """Whether B A has as many numbers as the weight; what is no plain low-rank product is let through."""
    first = [t for key, t in parts.items() if any(mark in key for mark in _FIRST)]
    second = [t for key, t in parts.items() if any(mark in key for mark in _SECOND)]
    if shape is None or len(first) != 1 or len(second) != 1 or any(key.endswith(_OTHER_SHAPE) for key in parts):
        return True
    return second[0].shape[0] * prod(first[0].shape[1:]) == prod(shape)
