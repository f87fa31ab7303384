"""LoRA files in diffusers format: keys `<network>.<module>.lora_A.weight` and `.lora_B.weight`, safetensors, metadata.

The scale alpha / rank is multiplied into B when a file is written, so that every loader applies the same update:
diffusers takes alpha from a JSON entry in the header, ComfyUI from `.alpha` keys that diffusers refuses for SD3, and
both take scale 1 where neither is there. B comes back bit for bit where alpha / rank is a power of two, else within one
rounding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dgpo_core.errors import UserError
from dgpo_core.files import write_atomic

_NETWORKS = ("transformer", "unet")
_KEY = re.compile(r"(?P<network>\w+?)\.(?P<module>.+)\.(?P<part>lora_A|lora_B|lora\.down|lora\.up)\.weight")
_KOHYA = re.compile(r"lora_unet_(?P<module>\w+)\.(?P<part>lora_down|lora_up)\.weight")
_PARTS = {"lora_A": 0, "lora.down": 0, "lora_down": 0, "lora_B": 1, "lora.up": 1, "lora_up": 1}


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds, at scale 1.

    network: "transformer" or "unet"; weights: per module A [r, in] and B [out, r], float32 on the CPU; metadata: the
    header's strings.
    """

    path: Path
    network: str
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


def tensors(network: str, state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The LoRA `state` (`<module>.lora_A.weight`, ...) of `network` as a file holds it: float32 copies on the CPU.

    scale: alpha / rank, multiplied into B.
    """
    found = {}
    for key, tensor in state.items():
        value = tensor.detach().to("cpu", torch.float32, copy=True)
        found[f"{network}.{key}"] = (value * scale if ".lora_B." in key else value).contiguous()
    return found


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


def read(path: str | Path) -> LoraFile:
    """Reads a LoRA in diffusers format, or what `for_comfyui` named, whose modules keep their "_" until `fit`.

    Raises UserError if the file is missing, damaged or something else.
    """
    path = Path(path)
    tensors, metadata = _load(path)
    config = _adapter_config(metadata)
    networks, pairs, alphas = set(), {}, {}
    for key, tensor in tensors.items():
        match, kohya = _KEY.fullmatch(key), _KOHYA.fullmatch(key)
        if kohya is not None and tensor.ndim == 2:
            networks.add("unet")
            pairs.setdefault(kohya["module"], [None, None])[_PARTS[kohya["part"]]] = tensor.float()
        elif match is not None and match["network"] in _NETWORKS and tensor.ndim == 2:
            networks.add(match["network"])
            pairs.setdefault(match["module"], [None, None])[_PARTS[match["part"]]] = tensor.float()
        elif key.startswith("lora_unet_") and key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha").removeprefix("lora_unet_")] = float(tensor)
        elif key.endswith(".alpha") and key.split(".")[0] in _NETWORKS:
            alphas[key.removesuffix(".alpha").split(".", 1)[1]] = float(tensor)
        else:
            raise UserError(_not_a_lora(path, key))
    if len(networks) != 1:
        raise UserError(f"{path} is not a LoRA of one diffusion network in diffusers format: give another file.")
    network = networks.pop()
    weights = {}
    for module, (a, b) in pairs.items():
        if a is None or b is None or a.shape[0] != b.shape[1]:
            raise UserError(f"The LoRA {path} is incomplete: A and B of {module} do not belong together.")
        weights[module] = (a, b * _scale(module, a.shape[0], alphas, config.get(network, {})))
    return LoraFile(path, network, weights, metadata)


def fit(
    lora: LoraFile, network: str, state: Mapping[str, Tensor], scale: float, layers: frozenset[str]
) -> dict[str, Tensor]:
    """The file as an adapter's state: the keys and shapes of `state`, for branches that are scaled by `scale`.

    A lower rank than the adapter's is filled up with zeros in B and the adapter's own start in A, so that it can learn;
    modules that the file leaves alone keep `state`. layers: names of all modules of the network, for the messages.
    Raises UserError if the file is for another family, changes modules that have no adapter, or has other shapes.
    """
    dotted = {layer.replace(".", "_"): layer for layer in layers}
    lora = replace(lora, weights={m if m in layers else dotted.get(m, m): w for m, w in lora.weights.items()})
    known = [m for m in lora.weights if f"{m}.lora_A.weight" in state]
    if lora.network != network or not any(m in layers for m in lora.weights):
        raise UserError(f"The LoRA {lora.path} is for another model: no layer of this one has the names in it.")
    if len(known) != len(lora.weights):
        name = sorted(set(lora.weights) - set(known))[0]
        advice = "add it to the LoRA targets" if name in layers else "give one of this model"
        raise UserError(f"The LoRA {lora.path} changes {name}, which has no adapter here: {advice}.")
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
        raise UserError(f"The LoRA {lora.path} has rank {rank}: set the rank to at least that, not {to_a.shape[0]}.")
    if a.shape[1] != to_a.shape[1] or b.shape[0] != to_b.shape[0]:
        here, there = (to_b.shape[0], to_a.shape[1]), (b.shape[0], a.shape[1])
        raise UserError(f"The LoRA {lora.path} does not fit: {module} is {here} in the model and {there} in the file.")
    to_a[:rank] = a
    to_b.zero_()
    to_b[:, :rank] = b / scale


def _scale(module: str, rank: int, alphas: Mapping[str, float], config: Mapping[str, object]) -> float:
    """alpha / rank of one module: from its `.alpha` key, else from diffusers' JSON, else 1."""
    if module in alphas:
        return alphas[module] / rank
    if "lora_alpha" not in config:
        return 1.0
    if config.get("alpha_pattern") or config.get("use_dora") or config.get("use_rslora"):
        raise UserError("The LoRA uses alpha patterns, DoRA or rank-stabilised scaling, which are not supported.")
    return float(str(config["lora_alpha"])) / rank


def _adapter_config(metadata: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """diffusers' `lora_adapter_metadata`, split by network: {"transformer": {"lora_alpha": 8, ...}}."""
    try:
        flat = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return {}
    config: dict[str, dict[str, object]] = {}
    for key, value in flat.items():
        network, _, name = key.partition(".")
        config.setdefault(network, {})[name] = value
    return config


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"There is no LoRA file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            # cloned: what safe_open returns may be a view of the mapped file
            return {key: file.get_tensor(key).clone() for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is not a readable .safetensors file ({error}): give a LoRA in diffusers format."
        ) from None


def _not_a_lora(path: Path, key: str) -> str:
    if key.startswith("text_encoder"):
        return f"The LoRA {path} also changes the text encoder, which DGPO does not train: give one without it."
    if key.startswith(("lora_unet_", "lora_te", "lora_transformer_", "diffusion_model.")):
        return f"The LoRA {path} is not in diffusers format (it has {key}): convert it first."
    return f"{path} is not a LoRA in diffusers format (it has {key}): give another file."


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors file with the header in one fixed order: the library writes the metadata in a random one."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
