"""All that the nodes ask of ComfyUI besides their schemas: folders, devices, memory, interrupt, progress."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import comfy.cli_args
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.v0_0_2 import io, ui
from PIL import Image
from server import PromptServer
from torch import Tensor
from tqdm import tqdm

from dgpo_core.comfy.forms import (
    EMBEDDED_EDITOR,
    EMBEDDED_MODEL,
    MODEL_FOLDERS,
    NO_LORA,
    SHIPPED,
    TEXT,
    WILDCARDS,
    shipped_model,
)
from dgpo_core.common import patience
from dgpo_core.common.errors import UserError
from dgpo_core.common.files import check_folder_name
from dgpo_core.common.reading import shown
from dgpo_core.people.gallery import MOST_CROPPED, cropped
from dgpo_core.policy import Policy
from dgpo_core.rewards import AUTOMATIC
from dgpo_core.rewards.published import names_here

CATEGORY = "DGPO"
REWARD_MODELS = "reward_models"
WEIGHTS = (".safetensors", ".sft", ".pt", ".pth")
FROM_CHECKPOINTS, FROM_DIFFUSERS = (f"{folder}/" for folder in MODEL_FOLDERS)
PREVIEW = 1024  # pixels of a preview's longer side
REWARD_BYTES = 6 * 2**30  # the largest reward model, with what it computes


@contextmanager
def engine() -> Iterator[None]:
    """Inside, tensors can be trained: ComfyUI runs nodes in inference mode. The global random state is left alone, and
    Cancel ends what is waited for."""
    random = torch.random.fork_rng(devices=_cuda())
    with torch.inference_mode(False), torch.enable_grad(), random, patience.asking(stop_if_cancelled):
        yield


def _cuda() -> list[torch.device]:
    device = comfy.model_management.get_torch_device()
    return [device] if device.type == "cuda" else []


def stop_if_cancelled() -> None:
    """Raises ComfyUI's interrupt once the user has pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def keeps_outputs() -> bool:
    """Whether ComfyUI keeps what a node gives out once the nodes that it goes to have run."""
    return not comfy.cli_args.args.cache_none


# --- folders ---------------------------------------------------------------------------------------------------------


def model_choices() -> list[str]:
    """The embedded models, every checkpoint, and every diffusers folder."""
    checkpoints = [n for n in folder_paths.get_filename_list("checkpoints") if n.endswith((".safetensors", ".sft"))]
    folders = []
    for root in folder_paths.get_folder_paths("diffusers"):
        for path, _, files in os.walk(root, followlinks=True):
            if "model_index.json" in files:
                folders.append(os.path.relpath(path, root).replace(os.sep, "/"))
    names = [FROM_CHECKPOINTS + n for n in checkpoints] + [FROM_DIFFUSERS + n for n in sorted(folders)]
    return [EMBEDDED_MODEL, EMBEDDED_EDITOR, *names]


def model_path(choice: str) -> str:
    """The path of one of `model_choices`, for `load_policy`; of one that ships the word that settings have for it."""
    if word := shipped_model(choice):
        return word
    if choice not in model_choices():
        raise UserError(f"There is no model {choice}: put it into models/checkpoints or models/diffusers and refresh.")
    if choice.startswith(FROM_CHECKPOINTS):
        return folder_paths.get_full_path_or_raise("checkpoints", choice.removeprefix(FROM_CHECKPOINTS))
    name = choice.removeprefix(FROM_DIFFUSERS)
    roots = [Path(root, name) for root in folder_paths.get_folder_paths("diffusers")]
    return str(next(path for path in roots if (path / "model_index.json").is_file()))


def lora_choices() -> list[str]:
    """The LoRA files that a policy can start from, after "none"."""
    return [NO_LORA, *(n for n in folder_paths.get_filename_list("loras") if n.endswith(".safetensors"))]


def lora_path(choice: str) -> str:
    """The path of one of `lora_choices`; empty for none."""
    if choice in (NO_LORA, ""):
        return ""
    if choice not in lora_choices():
        raise UserError(f"There is no LoRA {choice} in ComfyUI's loras folders: put it there and refresh.")
    return folder_paths.get_full_path_or_raise("loras", choice)


def reward_folders() -> list[str]:
    """Where the weights of rewards are looked for: models/reward_models, and what extra_model_paths.yaml adds."""
    folder_paths.add_model_folder_path(REWARD_MODELS, os.path.join(folder_paths.models_dir, REWARD_MODELS))
    return folder_paths.get_folder_paths(REWARD_MODELS)


def reward_file_choices() -> list[str]:
    """The files with weights in these folders, and published ones that are here in another form, after "automatic"."""
    reward_folders()
    files = [name for name in folder_paths.get_filename_list(REWARD_MODELS) if name.lower().endswith(WEIGHTS)]
    return [AUTOMATIC, *sorted({*files, *names_here()})]


def clip_words() -> Path:
    """The folder of ComfyUI's copy of CLIP's tokenizer."""
    return Path(comfy.utils.__file__).parent / "sd1_tokenizer"


def endpoints_file() -> Path:
    """Where named servers stand. ComfyUI's own routes neither read nor write a user's folder that begins with __."""
    return Path(folder_paths.get_user_directory()).absolute() / "__dgpo" / "endpoints.yaml"


def prompt_file_choices() -> list[str]:
    """The prompt files in the input folder, after the embedded ones."""
    folder = Path(folder_paths.get_input_directory())
    files = (
        sorted(p.name for p in folder.iterdir() if p.suffix.lower() in (".txt", ".jsonl")) if folder.is_dir() else []
    )
    return [TEXT, *SHIPPED, *files]


def prompt_file(choice: str) -> Path:
    """The path of a prompt file, which lies in the input folder."""
    folder = Path(folder_paths.get_input_directory()).resolve()
    path = _below(folder, choice)
    if path is None:
        raise UserError(f"The prompt file {shown(choice)} is outside of ComfyUI's input folder: put it there.")
    return path


def _below(root: Path, name: str) -> Path | None:
    """The path of that name below the root; None where it leads elsewhere, or can be no name."""
    try:
        path = (root / name).resolve()
    except ValueError:  # a NUL, or half a character
        return None
    return path if root in path.parents else None


def wildcard_folder() -> Path:
    """Where the files are that __names__ in prompts stand for."""
    return Path(folder_paths.get_input_directory()) / WILDCARDS


def wildcard_files() -> list[tuple[str, int]]:
    """Those that are there, and when each was changed."""
    return sorted((str(file), file.stat().st_mtime_ns) for file in wildcard_folder().rglob("*.txt"))


def input_folder(name: str) -> Path:
    """A folder below the input folder. Raises UserError for one that is outside, or not there."""
    root = Path(folder_paths.get_input_directory()).resolve()
    path = _below(root, name)
    if path is None or not path.is_dir():
        raise UserError(f"There is no folder {shown(name)} in ComfyUI's input folder: put the pictures there.")
    return path


def check_run(name: str) -> str:
    """The name of a run, if it can be one folder below the output folder."""
    if not 0 < len(name) <= 100 or name.startswith("."):
        raise UserError(f"The run name {shown(name)!r} cannot be a folder name: use letters, digits, '-', '_' and '.'.")
    check_folder_name(name, "run name")
    return name


def runs_folder() -> Path:
    """Where the runs of the nodes are kept."""
    return Path(folder_paths.get_output_directory()) / "dgpo"


# --- memory ----------------------------------------------------------------------------------------------------------


def device() -> torch.device:
    """Where models compute."""
    return comfy.model_management.get_torch_device()


def card() -> tuple[str, float] | None:
    """Name and bytes of the CUDA card where models compute; None where it is none."""
    where = device()
    if where.type != "cuda":
        return None
    return torch.cuda.get_device_name(where), float(comfy.model_management.get_total_memory(where))


class _Resident(comfy.model_patcher.ModelPatcher):
    """A policy in ComfyUI's account of memory: it moves as a whole, to the device or back to the CPU."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.movable(), load_device=device(), offload_device=torch.device("cpu"))
        self.policy = policy
        self.model.device = torch.device("cpu")

    def _move(self, to: torch.device) -> None:
        with torch.inference_mode(False):
            self.policy.to(to)
        self.model.device = to
        self.model.model_loaded_weight_memory = 0 if to == self.offload_device else self.model_size()

    def partially_load(self, device_to: torch.device, *args: Any, **kwargs: Any) -> float:
        self._move(device_to)
        return self.model.model_loaded_weight_memory

    def partially_unload(self, device_to: torch.device, *args: Any, **kwargs: Any) -> float:
        return 0  # all or nothing

    def detach(self, unpatch_all: bool = True) -> Any:
        if unpatch_all:  # else it is about to be loaded again
            self._move(self.offload_device)
        return self.model

    def current_loaded_device(self) -> torch.device:
        return self.model.device


def resident(policy: Policy) -> _Resident:
    """Hand it to `load`."""
    return _Resident(policy)


def load(model: _Resident) -> None:
    """The policy on the device, other models evicted as far as need be."""
    comfy.model_management.load_models_gpu([model], force_full_load=True)


def make_room() -> None:
    """Evict models, this policy among them, as far as a reward model needs the room."""
    if device().type != "cpu":
        comfy.model_management.free_memory(REWARD_BYTES, device())
        comfy.model_management.soft_empty_cache()


# --- pictures and progress -------------------------------------------------------------------------------------------


def to_image(picture: Image.Image) -> Tensor:
    """A picture as ComfyUI's IMAGE, [1, H, W, 3] in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB")))[None].float().div_(255.0)


def on_node(picture: Image.Image) -> dict[str, Any]:
    """What a node that shows the picture gives to the page.

    As a JPEG: to compress a large sheet as ComfyUI's own previews are takes a tenth of an iteration of a small model.
    """
    name, folder = f"dgpo_{uuid4().hex}.jpg", Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB").save(folder / name, quality=90, subsampling=0)
    return ui.SavedImages([ui.SavedResult(name, "", io.FolderType.temp)]).as_dict()


def fit(images: Tensor, height: int, width: int) -> Tensor:
    """Pictures [B, 3, H, W], cropped at the centre to the shape of height x width and scaled to it; on the CPU.

    Raises UserError where a crop would show something else than the picture.
    """
    images = images.cpu().float()
    if cropped((images.shape[-2], images.shape[-1]), (height, width)) > MOST_CROPPED:
        raise UserError(
            f"The images are {images.shape[-1]} x {images.shape[-2]} pixels, and the settings train {width} x {height},"
            " where a crop would show something else than what was rated: set width and height of Sampler Settings to"
            " the images' shape, or crop the images."
        )
    if images.shape[-2:] != (height, width):
        images = comfy.utils.common_upscale(images, width, height, "lanczos", "center")
    return images.clone(memory_format=torch.contiguous_format)


def images_of(groups: Sequence[Any]) -> Tensor:
    """All images of the groups as one IMAGE batch, [B, H, W, 3]."""
    return torch.cat([group.images for group in groups]).permute(0, 2, 3, 1).contiguous()


class Progress:
    """The bar on the node that runs, with a picture and a line of text under it. Calling it counts one micro-step."""

    def __init__(self, total: int, node: str) -> None:
        self.bar, self.total, self.node, self.done = comfy.utils.ProgressBar(total), total, node, 0
        self.console: tqdm | None = None

    def __call__(self) -> None:
        """Before every forward: stop here if the user has cancelled, else move the bar."""
        stop_if_cancelled()
        self.done += 1
        self.bar.update_absolute(min(self.done, self.total), self.total)

    def at(self, value: int, picture: Image.Image | None = None, text: str = "") -> None:
        """Show `value` of the total."""
        preview = None if picture is None else ("JPEG", picture.convert("RGB"), PREVIEW)
        self.bar.update_absolute(value, self.total, preview)
        if text:
            self.say(text)
            self._print(value, text.split("\n")[0])

    def _print(self, value: int, text: str) -> None:
        """The same on the console, on one line, until `close`."""
        self.console = self.console or tqdm(total=self.total, bar_format="{desc} |{bar:24}|")
        self.console.n = min(value, self.total)
        self.console.set_description_str(text)

    def close(self) -> None:
        """Ends the line on the console."""
        if self.console is not None:
            self.console.close()

    def say(self, text: str) -> None:
        """A line of text under the node, for the page that has queued the graph."""
        server = PromptServer.instance
        server.send_progress_text(text, self.node, server.client_id)
