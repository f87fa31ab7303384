"""`load_policy`: from a diffusers folder, a hub id or a single .safetensors checkpoint to a Policy."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dgpo_core.errors import UserError
from dgpo_core.policy import lora_file
from dgpo_core.policy.flux import Flux
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.policy.sd3 import SD3
from dgpo_core.policy.sd15 import SD15
from dgpo_core.policy.sdxl import SDXL

FAMILIES: dict[str, type[DiffusersPolicy]] = {
    "sd15": SD15,
    "sdxl": SDXL,
    "sd3": SD3,
    "flux": Flux,
}
"""The model families by name. A new one is one file and one line here."""

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


_OPTIONAL = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor", "safety_checker")


def load_policy(
    path: str | Path,
    *,
    family: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    init_lora: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    seed: int = 0,
    guidance: float = 3.5,
    offload: bool = False,
    config: str | Path | None = None,
) -> DiffusersPolicy:
    """Loads a model and puts the adapters on it.

    path: a diffusers folder, a hub id ("owner/name"), or a single .safetensors checkpoint. Only safetensors are read.
    family: a name in FAMILIES; None or "auto" reads it from the model.
    rank, alpha, dropout, targets: the LoRA (alpha / rank is its scale). Left out: the rank of `init_lora` at scale 1,
    else rank 32 and alpha 64; no targets are the family's default and what `init_lora` changes.
    init_lora: a LoRA in diffusers format that all three adapters start from; the reference stays the base without it.
    dtype: of the frozen base; "auto" is bfloat16 on an accelerator and float32 on a CPU. The LoRA is float32 always.
    seed: of the LoRA's start. guidance: embedded guidance scale (Flux dev).
    offload: text encoders and VAE are on the device only while they work.
    config: for a single checkpoint, a diffusers folder with its configs and tokenizers; left out, a folder with the
    checkpoint's name beside it, else the hub (or its cache).

    Raises UserError where the model, the LoRA or a setting does not fit. With HF_HUB_OFFLINE nothing is downloaded.
    """
    lora = None if init_lora is None or init_lora == "" else lora_file.read(init_lora)
    rank = (lora.rank if lora else 32) if rank is None else rank
    alpha = (rank if lora else 2.0 * rank) if alpha is None else alpha
    device = _device(device)
    dtype = _dtype(dtype, device)
    with _quiet():
        cls, pipe = _open(str(path), family, dtype, config)
        if not targets:
            targets = [*cls.targets, *(_dotted(lora.modules) if lora and lora.network == cls.network_name else [])]
        policy = cls(
            pipe, rank=rank, alpha=alpha, dropout=dropout, targets=targets, dtype=dtype, device=device, seed=seed,
            guidance=guidance, offload=offload,
        )  # fmt: skip
    if lora is not None:
        policy.load_lora(lora)
    return policy


def _dotted(modules: Sequence[str]) -> list[str]:
    """Without the names in kohya's form, which say nothing before the network is known."""
    return [name for name in modules if "." in name]


def family_of_file(path: Path) -> str | None:
    """The family of a single checkpoint, from the names of its tensors; None if it is none that is known."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = {key.removeprefix("model.diffusion_model.") for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable .safetensors file ({error}): download it again.") from None
    marks = {  # the first that is there decides: SDXL's UNet is SD1.5's with a label embedding
        "flux": "double_blocks.0.img_attn.norm.key_norm.scale",
        "sd3": "joint_blocks.0.context_block.adaLN_modulation.1.bias",
        "sdxl": "label_emb.0.0.weight",
        "sd15": "input_blocks.0.0.weight",
    }
    return next((family for family, mark in marks.items() if mark in keys), None)


def _open(
    path: str, family: str | None, dtype: torch.dtype, config: str | Path | None
) -> tuple[type[DiffusersPolicy], Any]:
    """The family's class and the loaded pipeline, on the CPU."""
    if family in (None, "", "auto"):
        family = None
    elif family not in FAMILIES:
        raise UserError(f"Unknown model family {family!r}: use one of auto, {', '.join(FAMILIES)}.")
    local = Path(path)
    if local.is_file():
        return _open_file(local, family, dtype, config)
    if local.is_dir():
        if not (local / "model_index.json").is_file():
            raise UserError(f"The folder {path} is not a diffusers model: it has no model_index.json.")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise UserError(f"There is no model {path}: give a diffusers folder, a hub id or a .safetensors file.")
    return _open_pipeline(path, family, dtype)


def _open_pipeline(path: str, family: str | None, dtype: torch.dtype) -> tuple[type[DiffusersPolicy], Any]:
    from diffusers import DiffusionPipeline
    from huggingface_hub import constants

    with _user_errors(f"The model {path} cannot be loaded"):
        index = dict(DiffusionPipeline.load_config(path, local_files_only=constants.HF_HUB_OFFLINE))
    name = index.get("_class_name")
    found = next((f for f, c in FAMILIES.items() if name in c.pipeline_classes), None)
    if found is None:
        raise UserError(f"The model {path} is a {name}, which is none of the families {', '.join(FAMILIES)}.")
    if family not in (None, found):
        raise UserError(f"The model {path} is of family {found}, not {family}: set the family to {found} or auto.")
    cls = FAMILIES[found]
    build = _pipeline_class(cls)
    # a component that is left out must be given as None
    absent = {k: None for k in inspect.signature(build).parameters if k.startswith(_OPTIONAL) and not _listed(index, k)}
    if found == "sd15":  # a classifier of finished images, of no use here
        absent |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with _user_errors(f"The model {path} cannot be loaded"):
        pipe = build.from_pretrained(
            path, dtype=dtype, use_safetensors=True, local_files_only=constants.HF_HUB_OFFLINE, **absent
        )
    return cls, pipe


def _open_file(
    path: Path, family: str | None, dtype: torch.dtype, config: str | Path | None
) -> tuple[type[DiffusersPolicy], Any]:
    from huggingface_hub import constants

    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no .safetensors file: only those are loaded (pickles can run code), so convert it.")
    found = family_of_file(path)
    if found is None:
        raise UserError(f"{path} is not a checkpoint of any of the families {', '.join(FAMILIES)}.")
    if family not in (None, found):
        raise UserError(f"The model {path} is of family {found}, not {family}: set the family to {found} or auto.")
    beside = path.with_suffix("")
    if config is None and (beside / "model_index.json").is_file():
        config = beside
    if config is not None and not (Path(config) / "model_index.json").is_file():
        raise UserError(f"The config folder {config} has no model_index.json: give a diffusers folder of this model.")
    cls = FAMILIES[found]
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False} if found == "sd15" else {}
    if config is not None:
        options["config"] = str(config)
        index = json.loads((Path(config) / "model_index.json").read_text())
        options |= {k: None for k in ("text_encoder_3", "tokenizer_3") if found == "sd3" and not _listed(index, k)}
    advice = "" if config is not None else (
        f" (its configs and tokenizers come from the hub: put a diffusers folder with them at {beside} to work offline)"
    )  # fmt: skip
    with _user_errors(f"The checkpoint {path} cannot be loaded{advice}"):
        pipe = _pipeline_class(cls).from_single_file(
            str(path), dtype=dtype, local_files_only=config is not None or constants.HF_HUB_OFFLINE, **options
        )
    return cls, pipe


def _listed(index: dict[str, Any], component: str) -> bool:
    return index.get(component) not in (None, [None, None])


def _pipeline_class(cls: type[DiffusersPolicy]) -> Any:
    import diffusers

    return getattr(diffusers, cls.pipeline_classes[0])


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"The device {device!s} is not there: {_first_line(error)}.") from None
    return found


def _dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise UserError(f"Unknown number type {dtype!r}: use auto or one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


@contextmanager
def _user_errors(what: str) -> Iterator[None]:
    """diffusers, transformers, safetensors and the hub raise all sorts of things about a bad model: one sentence."""
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {_first_line(error)}.") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and the notes that diffusers and transformers print while they load."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = of_diffusers.get_verbosity(), of_transformers.get_verbosity()
    bars = of_diffusers.is_progress_bar_enabled(), of_transformers.is_progress_bar_enabled()
    for library in (of_diffusers, of_transformers):
        library.set_verbosity(logging.ERROR)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bar in zip((of_diffusers, of_transformers), levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
