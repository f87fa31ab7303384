"""The names in LoRA files: which tensors are of one module, in which form they change it, and where a model has it.

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

_FIRST = r"[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight|\.lora_(?:A|down)(?:\.default)?(?:\.weight)?"
_SECOND = r"[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight|\.lora_(?:B|up)(?:\.default)?(?:\.weight)?"
_FORMS = {  # by the end of a key; the first that fits decides
    "LoRA": rf"{_FIRST}|{_SECOND}",
    "LoRA with a middle": r"\.lora_mid\.weight",
    "LoRA with a bias": r"\.lora_(?:A|B|up|down)(?:\.default)?\.bias",
    "LoRA of an embedding": r"\.lora_embedding_[AB](?:\.default)?",
    "DoRA": r"\.dora_scale|\.lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    "LoRA that changes the shape": r"\.reshape_weight",
    "LoHa": r"\.hada_\w+",
    "LoKr": r"\.lokr_\w+",
    "GLoRA": r"\.[ab][12]\.weight|\.bm?[12]?\.weight",
    "OFT": r"\.(?:oft|boft)_\w+(?:\.default)?(?:\.weight)?|\.rescale",
    "IA3": r"\.on_input|\.ia3_l(?:\.default)?(?:\.weight)?",
    "VeRA": r"\.vera_lambda_[bd](?:\.default)?(?:\.weight)?",
    "full difference": r"\.(?:diff|diff_b|set_weight|w_norm|b_norm)",
    "XLabs' LoRA": r"\.(?:qkv|proj)_lora\d?\.(?:up|down)\.weight",
}
_ALPHA = r"\.alpha"
_PART = re.compile(f"(?P<module>.+?)(?P<part>{'|'.join([*_FORMS.values(), _ALPHA])})")
_ENDS = {form: re.compile(f".+?(?:{ends})") for form, ends in _FORMS.items()}
_IS_FIRST, _IS_SECOND = re.compile(f".+?(?:{_FIRST})"), re.compile(f".+?(?:{_SECOND})")

_NEEDS: Mapping[str, tuple[tuple[str, ...], ...]] = {  # of each form, the ends that belong together
    "LoHa": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    "GLoRA": (("a1.weight", "a2.weight", "b1.weight", "b2.weight"),),
    "LoKr": tuple(
        (*one, *two)
        for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for two in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
}
_TOGETHER = (("hada_t1", "hada_t2"),)
_PREFIXES = ("base_model.model.", "unet.", "transformer.", "diffusion_model.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
_TEXT_ENCODERS = ("lora_te", "lora_prior_te", "text_encoder", "text_model.")


@dataclass(frozen=True)
class Matches:
    """The modules of a LoRA, by what can be done with them.

    targets: those that fit, with their weights; missing: those that the model does not have; misfits: those that it has
    with other shapes; incomplete: those of which a tensor is not there; twice: those whose weight another one changes.
    """

    targets: Mapping[str, Target]
    missing: tuple[str, ...] = ()
    misfits: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """How many modules the LoRA has."""
        return len(self.targets) + len(self.missing) + len(self.left_out)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Those that the model has and that cannot be applied."""
        return (*self.misfits, *self.incomplete, *self.twice)


def modules(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a LoRA by the module that they belong to; a name in no known form loses its last part."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _PART.fullmatch(key)
        grouped.setdefault(match["module"] if match else key.rpartition(".")[0] or key, {})[key] = tensor
    return grouped


def form(keys: Iterable[str]) -> str:
    """What changes a module that has these keys, in a word: LoRA, DoRA, LoHa, ...; "" for a form that is not known.

    Where there are several, the one that is no plain LoRA: it is what a plain reader would miss.
    """
    forms = [next((name for name, end in _ENDS.items() if end.fullmatch(key)), "") for key in keys if not is_alpha(key)]
    return next((name for name in forms if name != "LoRA"), "LoRA") if forms else ""


def is_alpha(key: str) -> bool:
    """Whether the key is that of a module's alpha."""
    return key.endswith(".alpha")


def is_first(key: str) -> bool:
    """Whether the key is that of a plain LoRA's A (or "down")."""
    return _IS_FIRST.fullmatch(key) is not None


def low_rank(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """A [r, in, ...] and B [out, r] of one module's tensors, float32, with alpha / r in B; None for other kinds.

    A of a convolution has the size of its kernel behind `in`, unless that is 1 x 1.
    """
    alpha = next((float(t) for key, t in parts.items() if is_alpha(key)), None)
    first, second = ([t for key, t in parts.items() if end.fullmatch(key)] for end in (_IS_FIRST, _IS_SECOND))
    known = len(first) + len(second) + (alpha is not None)
    if not (len(first) == len(second) == 1 and known == len(parts)):
        return None
    a, b = (_without_kernel(t.float()) for t in (*first, *second))
    if a.ndim < 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        return None
    return a, b if alpha is None else b * (alpha / a.shape[0])


def _without_kernel(tensor: Tensor) -> Tensor:
    """A convolution's [m, n, 1, 1] as [m, n]."""
    return tensor.flatten(1) if tensor.ndim > 2 and tensor.shape[2:].numel() == 1 else tensor


def match(state: Mapping[str, Tensor], key_map: Mapping[str, Target], shapes: Mapping[str, Size]) -> Matches:
    """Finds each module's weight: under its own name, else under another that diffusers' names are known by.

    shapes: of the model's weights, for those whose shape tells (a packed one's does not).
    """
    targets: dict[str, Target] = {}
    missing, misfits, incomplete, twice, taken = [], [], [], [], set()
    for module, parts in modules(state).items():
        name = next((n for n in _names(module) if n in key_map), None)
        if name is None:
            missing.append(module)
        elif not is_complete(parts):
            incomplete.append(module)
        elif not _fits(parts, _shape(key_map[name], shapes)):
            misfits.append(module)
        elif key_map[name] in taken:
            twice.append(module)
        else:
            targets[module] = key_map[name]
            taken.add(key_map[name])
    return Matches(targets, tuple(missing), tuple(misfits), tuple(incomplete), tuple(twice))


def is_complete(parts: Mapping[str, Tensor]) -> bool:
    """Whether all tensors are there that the forms in `parts` are made of. A form that is not known is."""
    ends = {_end(key) for key in parts}
    if all(map(is_alpha, parts)) or any(len(ends & set(group)) not in (0, len(group)) for group in _TOGETHER):
        return False
    needed = _NEEDS.get(form(parts))
    if needed is not None:
        return any(ends.issuperset(group) for group in needed)
    # a bias or a magnitude alone is none either
    plain = any(form([key]).startswith(("LoRA", "DoRA")) for key in parts)
    return not plain or all(any(end.fullmatch(key) for key in parts) for end in (_IS_FIRST, _IS_SECOND))


def without(state: Mapping[str, Tensor], left_out: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of all modules but these."""
    names = set(left_out)
    return {key: t for module, parts in modules(state).items() if module not in names for key, t in parts.items()}


def of_text_encoder(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the modules that are a text encoder's."""
    return tuple(name for name in names if name.startswith(_TEXT_ENCODERS))


def bare(module: str) -> str:
    """A module's name without what trainers put before it, and without "processor", which diffusers once put in it."""
    name = module.replace(".processor.", ".")
    for prefix in _FLAT_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def _names(module: str) -> Iterator[str]:
    """The names that a module may have in a key map: its own, then those of a diffusers module called so."""
    yield module
    name = bare(module)
    flat = name.replace(".", "_")
    yield from (f"lora_unet_{flat}", f"transformer.{name}", f"lora_transformer_{flat}", f"diffusion_model.{name}")


def _end(key: str) -> str:
    found = _PART.fullmatch(key)
    return found["part"].lstrip(".") if found else ""


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
    """Whether the change has as many numbers as the weight; of forms whose number is not known here, True."""
    ends = {_end(key): tensor for key, tensor in parts.items()}
    if "reshape_weight" in ends:
        return True
    counts = [count for count in _counts(parts, ends) if count is not None]
    if shape is None:
        return all(count > 0 for count in counts)
    scale = ends.get("dora_scale")
    return all(count == prod(shape) for count in counts) and (scale is None or scale.numel() in shape[:2])


def _counts(parts: Mapping[str, Tensor], ends: Mapping[str, Tensor]) -> Iterator[int | None]:
    """How many numbers each change in `parts` has, -1 where its tensors do not go together."""
    first, second = ([t for key, t in parts.items() if end.fullmatch(key)] for end in (_IS_FIRST, _IS_SECOND))
    if len(first) == len(second) == 1:
        yield _product(second[0], first[0]) if "lora_mid.weight" not in ends else None
    if "hada_w1_a" in ends and "hada_t1" not in ends:
        yield from (_product(ends[f"hada_w{i}_a"], ends[f"hada_w{i}_b"]) for i in (1, 2))
    if form(parts) == "LoKr" and "lokr_t2" not in ends:
        one, two = (_factor(ends, f"lokr_w{i}") for i in (1, 2))
        yield one * two if one > 0 and two > 0 else -1
    yield from (ends[name].numel() for name in ("diff", "w_norm", "set_weight") if name in ends)


def _factor(ends: Mapping[str, Tensor], name: str) -> int:
    return ends[name].numel() if name in ends else _product(ends[f"{name}_a"], ends[f"{name}_b"])


def _product(left: Tensor, right: Tensor) -> int:
    """How many numbers left [m, r, 1, ...] times right [r, n, ...] has."""
    if left.ndim < 2 or right.ndim < 2 or prod(left.shape[1:]) != right.shape[0]:
        return -1
    return left.shape[0] * prod(right.shape[1:])
