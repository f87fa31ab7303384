"""`load_policy`: from a diffusers folder, a hub id or a single file to a Policy."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import kind_at, shown
from dgpo_core.policy import distilled
from dgpo_core.policy.families import FAMILIES
from dgpo_core.policy.loading.folder import MODEL_INDEX, Opened, family_of_folder, open_folder
from dgpo_core.policy.loading.header import read_header
from dgpo_core.policy.loading.libraries import first_line, quiet
from dgpo_core.policy.loading.recognise import recognise
from dgpo_core.policy.loading.single_file import open_file
from dgpo_core.policy.loading.tensors import refuse_missing, refuse_not_finite
from dgpo_core.policy.lora import file as lora_file
from dgpo_core.policy.lora import names as lora_names
from dgpo_core.policy.lora.merge import merge_
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.policy.prompt_cache import PromptCache, identity
from dgpo_core.policy.quantised import NONE, refuse_unavailable

PREDICTIONS = ("auto", "epsilon", "v", "flow")
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


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
    prediction: str = "auto",
    quantize: str = NONE,
    quantize_text: str = NONE,
    offload_blocks: bool = False,
    prompt_cache: str | Path = "",
    prompt_cache_bytes: int = 8 * 2**30,
    few_step_lora: str | Path = "",
) -> DiffusersPolicy:
    """Loads a model and puts the adapters on it.

    path: a diffusers folder, a hub id ("owner/name"), or a single .safetensors or .gguf file; no pickles are read.
    family: a name in FAMILIES; None or "auto" reads it from the model.
    rank, alpha, dropout, targets: the LoRA (alpha / rank is its scale). Left out: the rank of `init_lora` at scale 1,
    else rank 32 and alpha 64; no targets are the family's default and what `init_lora` changes.
    init_lora: a plain LoRA of any trainer that all three adapters start from; the reference stays the base without it.
    dtype: of the frozen base; "auto" is bfloat16 on an accelerator and float32 on a CPU. The LoRA is float32 always.
    seed: of the LoRA's start. guidance: embedded guidance scale (Flux dev).
    offload: text encoders and VAE are on the device only while they work.
    config: for a single checkpoint, a diffusers folder with its configs and tokenizers; left out, a folder with the
    checkpoint's name beside it, else the hub (or its cache).
    prediction: what the network returns: epsilon, v or flow; "auto" finds it from all that the model says of itself.
    quantize: how the base's large layers are kept: "none" (in `dtype`), "fp8", "int8" or "nf4"; see `policy.quantised`.
    quantize_text: the same of the text encoders.
    offload_blocks: the base's blocks stay in main memory, and come to the device in turn; see `policy.host_blocks`.
    prompt_cache: a folder in which prompts that were read are kept, of all models together prompt_cache_bytes; "auto"
    is the user's own, empty none. The text encoders are then loaded once a prompt must be read.
    few_step_lora: a LoRA that is merged into the base, so that it is part of the reference, too.

    Raises UserError where the model, the LoRA or a setting does not fit. With HF_HUB_OFFLINE nothing is downloaded.
    """
    lora = None if init_lora is None or init_lora == "" else lora_file.read(init_lora)
    rank = (lora.rank if lora else 32) if rank is None else rank
    alpha = (rank if lora else 2.0 * rank) if alpha is None else alpha
    device = _device(device)
    dtype = _dtype(dtype, device)
    with quiet():
        for kind in {quantize, quantize_text}:
            refuse_unavailable(kind, device)
        found = _open(str(path), family, dtype, config, prediction, readers=not prompt_cache)
        cls, pipe = found.cls, found.pipe
        what = f"The model {shown(path)}"
        _refuse_unsound(pipe.components, what, dtype)
        made_fast = None
        if few_step_lora:
            made_fast = lora_file.read(few_step_lora)
            network = getattr(pipe, cls.network_name)
            merge_(lora_names.resolve(made_fast, network, cls.makers_names), network)
        later: dict[str, Any] = {}
        if prompt_cache:
            of = identity(found.texts, *_reading(cls, dtype, device, quantize_text))
            later["cache"] = PromptCache(prompt_cache, of, prompt_cache_bytes)
            later["late"] = functools.partial(_late, found, what, dtype)
        if lora is not None:
            lora = lora_names.resolve(lora, getattr(pipe, cls.network_name), cls.makers_names)
        targets = targets or [*cls.targets, *(lora.modules if lora else [])]
        policy = cls(
            pipe, rank=rank, alpha=alpha, dropout=dropout, targets=targets, dtype=dtype, device=device, seed=seed,
            guidance=guidance, offload=offload, quantize=quantize, quantize_text=quantize_text,
            offload_blocks=offload_blocks, **later,
        )  # fmt: skip
    fast = distilled.find(distilled.names_of(str(few_step_lora)), made_fast.metadata) if made_fast else None
    by_config = distilled.by_config(cls.family, policy.network.config, policy.scheduler_config)
    policy.few_steps = fast or found.few_steps or by_config
    if lora is not None:
        policy.load_lora(lora)
    return policy


def family_of(path: str | Path) -> str:
    """The family of a .safetensors file or a diffusers folder, by its header or index: no weight is read.

    Raises UserError where it cannot be trained.
    """
    return family_of_folder(str(path)) if kind_at(path, "The model") == "folder" else recognise(read_header(path))


def _refuse_unsound(parts: Mapping[str, Any], what: str, dtype: torch.dtype) -> None:
    """Raises UserError for modules without weights, or with some that are no numbers."""
    for name, module in parts.items():
        if isinstance(module, nn.Module):
            refuse_missing(module, name, what)
            refuse_not_finite(module, name, what, dtype)


def _late(found: Opened, what: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The text encoders, once they are needed."""
    with quiet():
        modules = found.late()
        _refuse_unsound(modules, what, dtype)
    return modules


def _reading(cls: type[DiffusersPolicy], dtype: torch.dtype, device: torch.device, quantize_text: str) -> list[str]:
    """All that an embedding depends on besides the model's files: how it is read, too."""
    import diffusers
    import transformers

    reader = next(parent for parent in cls.__mro__ if "_encode" in vars(parent))
    how = inspect.getsource(sys.modules[reader.__module__])
    versions = [torch.__version__, diffusers.__version__, transformers.__version__]
    return [how, str(dtype), device.type, quantize_text, *versions]


def _open(
    path: str,
    family: str | None,
    dtype: torch.dtype,
    config: str | Path | None,
    prediction: str,
    readers: bool,
) -> Opened:
    """The family's class and the loaded pipeline, on the CPU; readers: with its text encoders."""
    if family in (None, "", "auto"):
        family = None
    elif family not in FAMILIES:
        raise UserError(f"Unknown model family {family!r}: use one of auto, {', '.join(FAMILIES)}.")
    if prediction not in PREDICTIONS:
        raise UserError(f"Unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}.")
    local = Path(path)
    kind = kind_at(path, "The model")
    if kind == "file":
        return open_file(local, family, dtype, config, prediction, readers)
    if kind == "folder":
        if not (local / MODEL_INDEX).is_file():
            raise UserError(f"The folder {path} is not a diffusers model: it has no {MODEL_INDEX}.")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise UserError(f"There is no model {path}: give a diffusers folder, a hub id, a .safetensors or a .gguf file.")
    return open_folder(path, family, dtype, prediction, readers)


def _device(device: torch.device | str) -> torch.device:
    try:
        there = torch.device(device)
        torch.empty(0, device=there)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"The device {device!s} is not there: {first_line(error)}.") from None
    return there


def _dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise UserError(f"Unknown number type {dtype!r}: use auto or one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]
