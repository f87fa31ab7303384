"""Where a reward's weights come from: a path, the Hugging Face cache, the hub. Nothing but tensors is ever loaded."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dgpo_core.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_network(cls: Any, source: str, reward: str, size: str) -> Any:
    """`cls.from_pretrained(source)` on the CPU, for evaluation and without gradients.

    cls: a model class of transformers. source: a folder or a hub id. reward, size: who needs it and how much is
    downloaded, for the message. With HF_HUB_OFFLINE only the cache is looked into. Raises UserError where the model
    cannot be had, is not of this kind, or lacks weights (transformers would fill those with random numbers).
    """
    kwargs = {"use_safetensors": True, "output_loading_info": True}
    network, report = _from_pretrained(cls, source, reward, size, kwargs)
    missing = set(report["missing_keys"]) & {name for name, _ in network.named_parameters()}
    lacking = sorted(missing) + sorted(str(key) for key in report["mismatched_keys"])
    if lacking:
        raise UserError(
            f"Reward {reward!r}: {source} is not a complete {cls.__name__}: {len(lacking)} of its weights are missing,"
            f" such as {lacking[0]}. Give another folder, or download it again."
        )
    return network.eval().requires_grad_(False)


def load_helper(cls: Any, source: str, reward: str) -> Any:
    """`cls.from_pretrained(source)` for what has no weights: a tokenizer, a processor. Raises as `load_network`."""
    return _from_pretrained(cls, source, reward, "a few MB", {})


def _from_pretrained(cls: Any, source: str, reward: str, size: str, kwargs: dict[str, Any]) -> Any:
    if not isinstance(source, str) or not source:
        raise UserError(f"Reward {reward!r}: a model must be a folder or a hub id such as owner/name, not {source!r}.")
    local = Path(source).is_dir()
    if not local and not HUB_ID.fullmatch(source):
        raise UserError(f"Reward {reward!r}: there is no folder {source}.")
    try:
        return cls.from_pretrained(source, local_files_only=local or constants.HF_HUB_OFFLINE, **kwargs)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        if local:
            raise UserError(
                f"Reward {reward!r}: the folder {source} is not a {cls.__name__} in safetensors format ({reason})."
            ) from None
        raise UserError(_unavailable(reward, source, size, f"hf download {source}", reason)) from None


def find_file(path: str, repository: str, name: str, reward: str, size: str) -> Path:
    """The file `path`, or where that is empty, `name` of the hub's `repository` from the cache or the hub.

    Raises UserError where it cannot be had.
    """
    if path:
        if not Path(path).is_file():
            raise UserError(f"Reward {reward!r}: there is no file {path}.")
        return Path(path)
    try:
        return Path(hf_hub_download(repository, name, local_files_only=constants.HF_HUB_OFFLINE))
    except (OSError, ValueError) as error:
        what, command, reason = f"{repository}/{name}", f"hf download {repository} {name}", str(error).split("\n")[0]
        raise UserError(_unavailable(reward, what, size, command, reason)) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a PyTorch state dict; nothing but tensors is unpickled.

    Raises UserError for any other file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is not a file of weights ({reason}): download it again.") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a state dict: it holds something else than named tensors.")
    return state


def _unavailable(reward: str, what: str, size: str, command: str, reason: str) -> str:
    return (
        f"Reward {reward!r} needs {what} ({size}), which is not in the Hugging Face cache and could not be downloaded"
        f" ({reason}): run `{command}` where there is a network, or name a local copy in the reward's options."
    )
