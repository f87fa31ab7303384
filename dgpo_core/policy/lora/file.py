"""LoRA files: read from any trainer, written in diffusers' format (`<network>.<module>.lora_A.weight`, `.lora_B...`).

The scale alpha / rank is multiplied into B when a file is written, so that every loader applies the same update:
diffusers takes alpha from a JSON entry in the header, ComfyUI from `.alpha` keys that diffusers refuses for SD3, and
both take scale 1 where neither is there. B comes back bit for bit where alpha / rank is a power of two, else within one
rounding.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import reason, write_atomic
from dgpo_core.common.reading import shown
from dgpo_core.policy.lora import keys as lora_keys
from dgpo_core.policy.lora import scale as lora_scale
from dgpo_core.policy.lora.report import PLAIN

_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}

MOST_RANK = 4096
"""Of a LoRA that is read; published ones have up to 1024."""


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds, at scale 1.

    weights: per module A [r, in] (of a convolution [r, in, height, width]) and B [out, r], float32 on the CPU, under
    the names of the file or, after `lora_names.resolve`, of a network's own modules; metadata: the header's strings.
    """

    path: Path
    weights: Mapping[str, tuple[Tensor, Tensor]]
    metadata: Mapping[str, str]

    @property
    def rank(self) -> int:
        """The highest rank of its modules."""
        return max(a.shape[0] for a, _ in self.weights.values())

    @property
    def modules(self) -> list[str]:
        """The names of the modules that it changes, sorted."""
        return sorted(self.weights)


# --- writing ---------------------------------------------------------------------------------------------------------


def tensors(network: str, state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The LoRA `state` (`<module>.lora_A.weight`, ...) of `network` as a file holds it: float32 copies on the CPU.

    scale: alpha / rank, multiplied into B.
    """
    named = {}
    for key, tensor in state.items():
        value = tensor.detach().to("cpu", torch.float32, copy=True)
        named[f"{network}.{key}"] = (value * scale if ".lora_B." in key else value).contiguous()
    return named


def for_comfyui(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `tensors` gave, under names that ComfyUI's own loader knows, and diffusers and `read` do, too.

    It knows a transformer's as they are, and of a UNet kohya's: `lora_unet_<module, "_" for ".">.lora_down.weight`.
    """
    renamed = {}
    for key, tensor in tensors.items():
        module, _, part = key.removesuffix(".weight").rpartition(".")
        if not module.startswith("unet."):
            renamed[key] = tensor
            continue
        name = "lora_" + module.replace(".", "_")
        renamed[f"{name}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor
        if part == "lora_A":
            renamed[f"{name}.alpha"] = torch.tensor(float(tensor.shape[0]))
    return renamed


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a LoRA to `path`, atomically. Same arguments, same bytes. UserError if the file cannot be written."""
    strings = {"format": "pt", **{k: str(v) for k, v in metadata.items()}}
    write_atomic(path, _sorted_header(save(dict(tensors), strings)))


def describe(
    *, architecture: str, base_version: str, rank: int, alpha: float, prediction: str, extra: Mapping[str, str]
) -> dict[str, str]:
    """The header's strings: ModelSpec 1.0.1, the `ss_*` that other tools read, and what the caller adds or overrides.

    No date of its own, so that the same training gives the same file: pass `modelspec.date` if you want one.
    `ss_network_alpha` is the rank: the weights are written at scale 1.
    """
    own = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "DGPO LoRA",
        "modelspec.prediction_type": prediction,
        "ss_base_model_version": base_version,
        "ss_network_module": "peft.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "dgpo.lora_rank": str(rank),
        "dgpo.lora_alpha": str(alpha),
    }
    return {**own, **extra}


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors file with the header in one fixed order: the library writes the metadata in a random one."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


# --- reading ---------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's strings of a LoRA of any trainer, each module's scale in its `.alpha`.

    Raises UserError where the file is missing, damaged or no LoRA, and for numbers that cannot be (see `check`).
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"The LoRA {shown(path)} is no ordinary file: give a .safetensors file.")
        with safe_open(path, framework="pt") as file:
            keys, metadata = list(file.keys()), dict(file.metadata() or {})
            _require_lora(path, keys)
            # cloned: what safe_open returns may be a view of the mapped file
            state = {key: file.get_tensor(key).clone() for key in keys}
    except FileNotFoundError:
        raise UserError(f"There is no LoRA file {shown(path)}.") from None
    except UserError:
        raise
    except Exception as error:  # also numbers of a type that torch does not have
        why = shown(reason(error))
        raise UserError(f"{shown(path)} is not a readable .safetensors file ({why}): give another file.") from None
    refuse_unusable(path, state)
    return lora_scale.with_alphas(path, state, metadata), metadata


def refuse_unusable(name: str | Path, state: Mapping[str, Tensor]) -> None:
    """Raises UserError, naming the module, for a LoRA whose numbers cannot be.

    NaN and infinite ones, whole ones for weights, empty tensors, an alpha that is no number, a rank beyond all reason.
    """
    for module, parts in lora_keys.modules(state).items():
        where = f"The LoRA {shown(name)} cannot be used: {shown(module)}"
        for key, tensor in parts.items():
            is_alpha = lora_keys.is_alpha(key)
            if tensor.numel() == 0:
                raise UserError(f"{where} has an empty tensor.")
            if tensor.dtype not in _FLOATS and not is_alpha and not key.endswith(".reshape_weight"):
                raise UserError(f"{where} holds numbers of the type {str(tensor.dtype).removeprefix('torch.')}.")
            if not torch.isfinite(tensor.float()).all():
                raise UserError(f"{where} holds numbers that are not finite (NaN or infinite): take an earlier file.")
            if is_alpha and tensor.numel() != 1:
                raise UserError(f"{where} has an alpha of {tensor.numel()} numbers, and must have one.")
            if lora_keys.is_first(key) and tensor.shape[:1].numel() > MOST_RANK:
                raise UserError(f"{where} has rank {tensor.shape[0]}, and none above {MOST_RANK} is read.")


def read(path: str | Path) -> LoraFile:
    """The plain LoRA in a file, at scale 1 and under the names of the file.

    Raises UserError if the file is missing, damaged or no LoRA, and, with the form's name, if it is none that training
    can go on from.
    """
    path = Path(path)
    state, metadata = load(path)
    modules = lora_keys.modules(state)
    if lora_keys.of_text_encoder(modules):
        raise UserError(
            f"The LoRA {shown(path)} also changes the text encoder, which DGPO does not train: give one without it."
        )
    return LoraFile(path, {module: _plain(path, module, parts) for module, parts in modules.items()}, metadata)


def _plain(path: Path, module: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B of one module."""
    form = lora_keys.form(parts)
    if form not in ("LoRA", ""):
        raise UserError(
            f"The LoRA {shown(path)} is no plain one, and training goes on from no other: {shown(module)} is of the"
            f" form {form}; {PLAIN}."
        )
    pair = lora_keys.low_rank(parts)
    if pair is None:
        raise UserError(f"The LoRA {shown(path)} is incomplete: A and B of {shown(module)} do not belong together.")
    return pair


def _require_lora(path: Path, keys: list[str]) -> None:
    """Raises UserError for a file without a tensor, and for one with none of a LoRA's, before they are loaded."""
    if not keys:
        raise UserError(f"{shown(path)} has no tensors in it, so it is no LoRA: give another file.")
    if not any(lora_keys.form([key]) for key in keys):
        what = "a whole model" if any(map(_of_a_model, keys)) else "no LoRA in any known format"
        raise UserError(f"{shown(path)} is {what} (it has {shown(keys[0])}): give a LoRA.")


def _of_a_model(key: str) -> bool:
    return key.startswith(("model.diffusion_model.", "first_stage_model.", "double_blocks.", "joint_blocks."))


# --- into an adapter -------------------------------------------------------------------------------------------------


def fit(lora: LoraFile, state: Mapping[str, Tensor], scale: float, layers: frozenset[str]) -> dict[str, Tensor]:
    """The file as an adapter's state: the keys and shapes of `state`, for branches that are scaled by `scale`.

    A lower rank than the adapter's is filled up with zeros in B and the adapter's own start in A, so that it can learn;
    modules that the file leaves alone keep `state`. layers: names of all modules of the network, for the messages.
    Raises UserError if the file changes modules that have no adapter, or has other shapes.
    """
    known = [m for m in lora.weights if f"{m}.lora_A.weight" in state]
    if len(known) != len(lora.weights):
        name = sorted(set(lora.weights) - set(known))[0]
        advice = "add it to the LoRA targets" if name in layers else "give one of this model"
        raise UserError(f"The LoRA {shown(lora.path)} changes {shown(name)}, which has no adapter here: {advice}.")
    fitted = {key: value.detach().to("cpu", torch.float32, copy=True) for key, value in state.items()}
    for module in known:
        _put(lora, module, fitted, scale)
    return fitted


def _put(lora: LoraFile, module: str, state: dict[str, Tensor], scale: float) -> None:
    """Writes one module of the file into the adapter's A and B."""
    a, b = lora.weights[module]
    to_a, to_b = state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"]
    rank = a.shape[0]
    if rank > to_a.shape[0]:
        raise UserError(
            f"The LoRA {shown(lora.path)} has rank {rank}: set the rank to at least that, not {to_a.shape[0]}."
        )
    if _inner(a) != _inner(to_a) or b.shape[0] != to_b.shape[0]:
        here, there = (to_b.shape[0], *_inner(to_a)), (b.shape[0], *_inner(a))
        raise UserError(
            f"The LoRA {shown(lora.path)} does not fit: {module} is {here} in the model and {there} in the file."
        )
    to_a[:rank] = a.reshape(rank, *to_a.shape[1:])
    to_b.zero_()
    to_b[:, :rank] = (b / scale).reshape(-1, rank, *to_b.shape[2:])


def _inner(a: Tensor) -> tuple[int, ...]:
    """What A takes in: the size of its input, and of its kernel where that is larger than 1 x 1."""
    return tuple(a.shape[1:2]) if math.prod(a.shape[2:]) == 1 else tuple(a.shape[1:])
