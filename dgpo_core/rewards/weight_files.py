"""Where a reward's weights come from: a path, a folder of models, the Hugging Face cache, the hub.

Nothing but tensors is ever loaded.
"""

import os
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ASK_S = 5.0  # seconds that the hub has to say whether it has a file

_folders: list[Path] = [Path(path) for path in os.environ.get("DGPO_REWARD_MODELS", "").split(os.pathsep) if path]
_supplied: dict[str, Path] = {}


@dataclass(frozen=True)
class Weights:
    """One thing that a reward downloads.

    repository: its id on the Hugging Face hub. size: of the download, for people. option: the reward's option that
    names another place: a path, or a hub id where `file` is empty. file: the one file that is needed of the repository;
    empty where it is a model's folder. also: other names that it has where people keep it; of a model's folder, the
    names of the one file that holds all its weights. supplied: what the program itself may have of it (`supply`).
    """

    repository: str
    size: str
    option: str = "path"
    file: str = ""
    also: tuple[str, ...] = ()
    supplied: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """What it may be called in a folder of reward models."""
        return (self.file or self.repository.rpartition("/")[2], *self.also)

    @property
    def command(self) -> str:
        """How to download it by hand."""
        return f"hf download {self.repository} {self.file}".rstrip()

    def __str__(self) -> str:
        return f"{self.repository}/{self.file}" if self.file else self.repository


def look_in(folders: Iterable[str | Path]) -> None:
    """Make these the folders in which `find` looks, such as ComfyUI's models/reward_models.

    At the start they are those in the environment variable DGPO_REWARD_MODELS, separated as in PATH.
    """
    _folders[:] = [Path(folder) for folder in folders]


def supply(what: str, folder: str | Path) -> None:
    """Say where this program has what weights call `supplied`, such as ComfyUI its copy of CLIP's tokenizer."""
    _supplied[what] = Path(folder)


def find(weights: Weights, given: str = "") -> str:
    """Where the weights are: what the option says, else a path in one of the folders of models, else what is supplied,
    else the hub's id.

    given: the value of `weights.option`. What is on the hub is looked for in the Hugging Face cache first.
    """
    if given:
        return given
    places = [folder / name for folder in _folders for name in weights.names]
    places += [_supplied[weights.supplied]] if weights.supplied in _supplied else []
    return next((str(place) for place in places if place.exists()), weights.repository)


def in_folders(name: str) -> Path | None:
    """The file of this name in one of the folders of models; None where there is none."""
    return next((folder / name for folder in _folders if (folder / name).is_file()), None)


def named(name: str) -> Path:
    """The file of this name, which may be in a subfolder, in one of the folders of models; the folder of a whole model
    where it is that model's own file.

    Raises UserError where there is none, and for a name that could lead out of the folders.
    """
    parts = name.replace("\\", "/").split("/")  # saved on Windows, a name in a subfolder has backslashes
    if not all(part.strip(" .") and not {":", "\0"} & set(part) for part in parts):
        raise UserError(f"The weights {shown(name)} are not the name of a file in the folder of reward models.")
    found = in_folders("/".join(parts))
    if found is None:
        where = f" ({_folders[0]})" if _folders else ", which the variable DGPO_REWARD_MODELS names"
        raise UserError(
            f"There is no file {shown(name)} in the folder of reward models{where}: put it there, or choose automatic."
        )
    own = found.name == "model.safetensors" and (found.parent / "config.json").is_file()
    return found.parent if own else found


def one_file(weights: Weights, given: Any = "") -> Path | None:
    """The one file that a model's weights are in; None where `find` finds something else."""
    source = find(weights, given)
    return Path(source) if isinstance(source, str) and Path(source).is_file() else None


def is_here(weights: Weights) -> bool:
    """Whether they are in one of the folders of models or in the Hugging Face cache; asks nobody."""
    source = find(weights)
    return Path(source).exists() or isinstance(try_to_load_from_cache(source, weights.file or "config.json"), str)


def require(weights: Weights, given: str, reward: str) -> None:
    """Raises UserError, in one sentence, where the weights are neither here nor to be had; downloads nothing."""
    source = find(weights, given)
    if not isinstance(source, str) or Path(source).exists():
        return  # what is wrong with it, its loader says
    if weights.file and source != weights.repository:
        raise UserError(f"Reward {reward!r}: there is no file {source}.")
    if not HUB_ID.fullmatch(source):
        raise UserError(f"Reward {reward!r}: there is no folder {source}.")
    file = weights.file or "config.json"
    if isinstance(try_to_load_from_cache(source, file), str):
        return
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            get_hf_file_metadata(hf_hub_url(source, file), timeout=ASK_S)
            return
        except Exception as error:  # of whatever HTTP library the hub's client is built on
            reason = _said(error)
    raise UserError(_unavailable(reward, Weights(source, weights.size, weights.option, weights.file), reason))


def load_network(cls: Any, weights: Weights, given: str, reward: str) -> Any:
    """`cls.from_pretrained` of what `find` finds, on the CPU, for evaluation and without gradients.

    cls: a model class of transformers. reward: who needs it, for the message. With HF_HUB_OFFLINE only the cache is
    looked into. Raises UserError where the model cannot be had, is not of this kind, or lacks weights (transformers
    would fill those with random numbers).
    """
    kwargs = {"use_safetensors": True, "output_loading_info": True}
    network, report = _from_pretrained(cls, weights, given, reward, kwargs)
    missing = set(report["missing_keys"]) & {name for name, _ in network.named_parameters()}
    lacking = sorted(missing) + sorted(str(key) for key in report["mismatched_keys"])
    if lacking:
        raise UserError(
            f"Reward {reward!r}: {find(weights, given)} is not a complete {cls.__name__}: {len(lacking)} of its weights"
            f" are missing, such as {lacking[0]}. Give another folder, or download it again."
        )
    return network.eval().requires_grad_(False)


def load_helper(cls: Any, weights: Weights, given: str, reward: str) -> Any:
    """`cls.from_pretrained` of what has no weights: a tokenizer, a processor. Raises as `load_network`."""
    return _from_pretrained(cls, weights, given, reward, {})


def _from_pretrained(cls: Any, weights: Weights, given: str, reward: str, kwargs: dict[str, Any]) -> Any:
    source = find(weights, given)
    if not isinstance(source, str):
        raise UserError(f"Reward {reward!r}: a model must be a folder or a hub id such as owner/name, not {source!r}.")
    local = Path(source).is_dir()
    if not local and not HUB_ID.fullmatch(source):
        raise UserError(f"Reward {reward!r}: there is no folder {source}.")
    try:
        return cls.from_pretrained(source, local_files_only=local or constants.HF_HUB_OFFLINE, **kwargs)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = _said(error)
        if local:
            raise UserError(
                f"Reward {reward!r}: the folder {source} is not a {cls.__name__} in safetensors format ({reason})."
            ) from None
        raise UserError(_unavailable(reward, Weights(source, weights.size, weights.option), reason)) from None


def find_file(weights: Weights, given: str, reward: str) -> Path:
    """The file, downloaded where it is neither in a folder nor in the cache. Raises UserError where that fails."""
    source = find(weights, given)
    if source != weights.repository:
        if not isinstance(source, str) or not Path(source).is_file():
            raise UserError(f"Reward {reward!r}: there is no file {source}.")
        return Path(source)
    try:
        return Path(hf_hub_download(weights.repository, weights.file, local_files_only=constants.HF_HUB_OFFLINE))
    except Exception as error:  # of whatever HTTP library the hub's client is built on
        raise UserError(_unavailable(reward, weights, _said(error))) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a PyTorch state dict or a checkpoint with a "state_dict".

    Nothing but tensors and plain values is unpickled.
    Raises UserError for any other file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = _said(error)
        raise UserError(f"{path} is not a file of weights ({reason}): download it again.") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]  # a checkpoint of OpenCLIP or Lightning
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a state dict: it holds something else than named tensors.")
    return state


def _said(error: Exception) -> str:
    """The first sentence of what a library says."""
    return str(error).strip().split("\n")[0].split(". ")[0].removesuffix(".") or type(error).__name__


def _unavailable(reward: str, weights: Weights, reason: str) -> str:
    folder = f"put it into {_folders[0]} as {weights.names[0]}, or " if _folders else ""
    return (
        f"Reward {reward!r} needs {weights} ({weights.size}), which is not in the Hugging Face cache and could not be"
        f" downloaded ({reason}): run `{weights.command}` where there is a network, or {folder}name a"
        f" local copy in the reward's option {weights.option}."
    )
