"""A diffusers folder, here or on the hub: what its configs say of it, and the pipeline in it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dgpo_core.common.errors import UserError
from dgpo_core.common.packages import is_installed, missing
from dgpo_core.common.reading import read_json, shown
from dgpo_core.policy import distilled
from dgpo_core.policy.distilled import FewSteps
from dgpo_core.policy.families import FAMILIES
from dgpo_core.policy.family import TEXT_ENCODERS
from dgpo_core.policy.loading import predicts, recognise, tensors
from dgpo_core.policy.loading.header import Header, read_header
from dgpo_core.policy.loading.libraries import user_errors
from dgpo_core.policy.pipeline import DiffusersPolicy

_MOST_STEPS = 100_000
MODEL_INDEX = "model_index.json"
_OPTIONAL = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor", "safety_checker")
_UNUSED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_MODULE_FOLDERS = ("unet", "transformer", "vae", *TEXT_ENCODERS)
# model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model-00001-of-00002.fp16...
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?")


def local_only() -> bool:
    """Whether nothing may be downloaded (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


@dataclass(frozen=True)
class Folder:
    """A diffusers model by its folder, or by its id on the hub."""

    path: str

    @cached_property
    def index(self) -> Mapping[str, Any]:
        """model_index.json."""
        return self.config(MODEL_INDEX)

    def lists(self, component: str) -> bool:
        """Whether the pipeline has this component."""
        return self.index.get(component) not in (None, [None, None])

    def config(self, name: str) -> Mapping[str, Any]:
        """A JSON table of the folder, such as unet/config.json; empty where it is not there."""
        with user_errors(f"The model {shown(self.path)} cannot be loaded"):
            file = Path(self.path, name) if Path(self.path).is_dir() else self._of_the_hub(name)
        if not file.is_file():
            return {}
        table = read_json(file, "The file")
        if not isinstance(table, dict):
            raise UserError(f"The file {shown(file)} is no table of settings: download it again.")
        return table

    def _of_the_hub(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.path, name, local_files_only=local_only()))
        except LocalEntryNotFoundError:
            if name == MODEL_INDEX:
                raise
            return Path(name)
        except EntryNotFoundError:
            return Path(name)

    def scheduler(self) -> tuple[Mapping[str, Any], str]:
        """The scheduler's config, and the name of its class in model_index.json."""
        listed = self.index.get("scheduler")
        name = listed[1] if isinstance(listed, list) and len(listed) == 2 and isinstance(listed[1], str) else ""
        config = self.config("scheduler/scheduler_config.json")
        if not config:
            raise UserError(
                f"The model {shown(self.path)} has no scheduler/scheduler_config.json, which says what it predicts:"
                " put that of the model that it was made from there."
            )
        steps = config.get("num_train_timesteps", 1000)
        if type(steps) is not int or not 1 <= steps <= _MOST_STEPS:
            raise UserError(
                f"The scheduler of the model {shown(self.path)} has {shown(steps, 40)} for num_train_timesteps, but"
                f" that is a whole number from 1 to {_MOST_STEPS}."
            )
        return config, name

    def component_class(self, name: str) -> Any:
        """The class that model_index.json names for a component; of diffusers or transformers alone.

        Raises UserError where the installed version has none of this name.
        """
        import diffusers
        import transformers

        library, cls = self.index[name]
        there = {"diffusers": diffusers, "transformers": transformers}[library]
        if not hasattr(there, cls):
            raise UserError(
                f"The model {shown(self.path)} has a {name} of the class {shown(cls, 60)}, which {library}"
                f" {there.__version__} does not know: run `pip install -U {library}`."
            )
        return getattr(there, cls)

    def build(self, cls: type[DiffusersPolicy], dtype: torch.dtype, **parts: Any) -> Any:
        """The pipeline of a family; parts: components that are made already, or None for those to do without."""
        import diffusers

        for package in cls.needs:
            if not is_installed(package):
                raise missing(f"A model of the family {cls.family}", package)
        made = getattr(diffusers, self.index["_class_name"] if cls.built_as_named else cls.pipeline_classes[0])
        known = inspect.signature(made).parameters
        # a component that is left out must be given as None
        absent = {k: None for k in known if k.startswith(_OPTIONAL) and not self.lists(k)}
        unused = {k: v for k, v in _UNUSED.items() if k in known}  # a classifier of finished images, of no use here
        options = {"dtype": dtype, "use_safetensors": True, "local_files_only": local_only()}
        return made.from_pretrained(self.path, **options, **{**absent, **unused, **parts})


@dataclass(frozen=True)
class Opened:
    """A model as it was found: its family's class and its pipeline, on the CPU.

    late: the text encoders by name, where the pipeline was made without them; each call reads them from their files.
    texts: the files that decide what becomes of a prompt. few_steps: what the model says of being made for few steps.
    """

    cls: type[DiffusersPolicy]
    pipe: Any
    late: Callable[[], dict[str, nn.Module]]
    texts: list[Path]
    few_steps: FewSteps | None = None


def open_folder(path: str, family: str | None, dtype: torch.dtype, prediction: str, readers: bool = True) -> Opened:
    """The model in a folder, or of an id of the hub; readers: with its text encoders, which else come later."""
    folder, what = Folder(path), f"The model {shown(path)}"
    cls, config, name = _described(folder, family, what)
    predicts.settle(what, predicts.Evidence(), config, name, cls, asked=prediction)  # before a download
    folder = _here(folder, what)
    _refuse_absent(folder, what)
    headers = [read_header(file) for file in _weight_files(Path(folder.path))]
    own = [h for h in headers if h.path.parent.name == cls.network_name]
    _refuse_weights(headers)
    evidence = predicts.together([predicts.of_header(h, cls.kinds, cls.predicted_by) for h in own])
    scheduler = predicts.settle(what, evidence, config, name, cls, asked=prediction)
    variant = _variant(Path(folder.path))
    options = {"scheduler": scheduler, **({"variant": variant} if variant else {})}

    def build(without: Iterable[str]) -> Any:
        with user_errors(f"{what} cannot be loaded"):
            pipe = folder.build(cls, dtype, **options, **dict.fromkeys(filter(folder.lists, without)))
        _refuse_missing(pipe, headers, what)
        return pipe

    pipe = build(() if readers else TEXT_ENCODERS)
    names = [*distilled.names_of(path), str(folder.index.get("_name_or_path", ""))]
    few = next((few for h in own if (few := distilled.find((), h.metadata))), None)
    few = distilled.find(names, {}, name) or few
    late = lambda: readers_of(build((cls.network_name, "vae")))  # noqa: E731
    return Opened(cls, pipe, late, text_files(Path(folder.path)), few)


def readers_of(pipe: Any) -> dict[str, nn.Module]:
    """The text encoders of a pipeline, by name."""
    return {name: module for name, module in pipe.components.items() if name in TEXT_ENCODERS and module is not None}


def text_files(folder: Path) -> list[Path]:
    """What of a model's folder decides what becomes of a prompt."""
    parts = [*folder.glob("text_encoder*/*"), *folder.glob("tokenizer*/*"), folder / MODEL_INDEX]
    return [path for path in parts if path.is_file()]


def open_configs(
    path: str, family: str | None, dtype: torch.dtype, prediction: str
) -> tuple[type[DiffusersPolicy], Any]:
    """As `open_folder` for a folder on this machine, but no weight is read: the modules are on the device "meta"."""
    from diffusers import ModelMixin

    folder, what = Folder(path), f"The model {shown(path)}"
    cls, config, name = _described(folder, family, what)
    scheduler = predicts.settle(what, predicts.Evidence(), config, name, cls, asked=prediction)
    parts = {}
    with user_errors(f"{what} cannot be loaded"):
        for part in filter(folder.lists, _MODULE_FOLDERS):
            made, settings = folder.component_class(part), dict(folder.config(f"{part}/config.json"))
            with torch.device("meta"):
                is_network = issubclass(made, ModelMixin)
                module = made.from_config(settings) if is_network else made(made.config_class.from_dict(settings))
            parts[part] = tensors.cast(module, dtype)
        return cls, folder.build(cls, dtype, scheduler=scheduler, **parts)


def _here(folder: Folder, what: str) -> Folder:
    """The folder on this machine: that of the hub is downloaded, or found in the cache."""
    from diffusers import DiffusionPipeline

    if Path(folder.path).is_dir():
        return folder
    options = {"use_safetensors": True, "local_files_only": local_only()}
    with user_errors(f"{what} cannot be loaded"):
        try:
            return Folder(str(DiffusionPipeline.download(folder.path, **options)))
        except (OSError, ValueError):  # what it says where there are fp16 files alone
            return Folder(str(DiffusionPipeline.download(folder.path, variant="fp16", **options)))


def holds_weights(folder: Path, component: str) -> bool:
    """Whether a local folder has a component's weights."""
    return any((folder / component).glob("*.safetensors"))


def _described(folder: Folder, family: str | None, what: str) -> tuple[type[DiffusersPolicy], Mapping[str, Any], str]:
    """What a folder's configs say: the family's class, the scheduler's settings and its name.

    family: the one that was asked for, if any. Raises UserError for another, and for what cannot be trained.
    """
    cls = recognise.family_class(_family(folder, what), family, what)
    _refuse_configs(folder, cls, what)
    _refuse_too_new(folder)
    return cls, *folder.scheduler()


def family_of_folder(path: str) -> str:
    """The family of a diffusers folder, by its model_index.json. Raises UserError for none that can be trained."""
    return _family(Folder(path), f"The model {shown(path)}")


def _family(folder: Folder, what: str) -> str:
    name = folder.index.get("_class_name")
    family = next((f for f, c in FAMILIES.items() if name in c.pipeline_classes), None)
    others = {other: told for c in FAMILIES.values() for other, told in c.other_pipelines.items()}
    if isinstance(name, str) and name in others:
        raise UserError(f"{what} is {others[name]}.")
    if family is None:
        raise UserError(
            f"{what} is a {shown(name, 80)}, which is none of the families {', '.join(FAMILIES)}: take one of those"
            " (in ComfyUI, DGPO Policy (native) trains most other models of images)."
        )
    for sign, other in FAMILIES[family].other_models.items():
        if folder.index.get(sign) not in (None, False, [None, None]):
            raise UserError(f"{what} is {other}.")
    return family


def _refuse_configs(folder: Folder, cls: type[DiffusersPolicy], what: str) -> None:
    """Raises UserError for a network of another kind than the family's, by its config."""
    network, vae = folder.config(f"{cls.network_name}/config.json"), folder.config("vae/config.json")
    refuse_not_brought(folder, cls, what)
    channels = network.get("in_channels")
    recognise.refuse_channels(cls, channels if isinstance(channels, int) else None, what)
    latent = vae.get("latent_channels", vae.get("z_dim"))  # VAEs of films have the latter
    if isinstance(channels, int) and isinstance(latent, int) and channels != latent * cls.packing:
        raise UserError(
            f"{what} has a network that takes {channels} channels where its VAE gives {latent * cls.packing}: it is an"
            " inpainting or editing model, or its parts are of different models."
        )
    if network.get("time_cond_proj_dim") is not None:
        raise UserError(f"{what} is distilled as an LCM, which cannot be trained here: take the model it was made of.")
    for name in _MODULE_FOLDERS:
        if "quantization_config" in folder.config(f"{name}/config.json"):
            raise UserError(f"{what} has a quantised {name}, which is not read here: {tensors.FULLER}.")


def refuse_not_brought(folder: Folder, cls: type[DiffusersPolicy], what: str) -> None:
    """Raises UserError for a folder as it was published, where a user must put something into it."""
    lacking = [f"{told} ({name}/)" for name, told in cls.brought.items() if not folder.lists(name)]
    if lacking:
        raise UserError(
            f"{what} comes without {' and '.join(lacking)}: put {'it' if len(lacking) == 1 else 'them'} into its folder"
            f" and into its {MODEL_INDEX}, as dgpo_core/policy/README.md shows."
        )


def _refuse_too_new(folder: Folder) -> None:
    """Raises UserError for a component that is newer than the installed library."""
    for name in filter(folder.lists, _MODULE_FOLDERS):
        listed = folder.index[name]
        if isinstance(listed, list) and len(listed) == 2 and listed[0] in ("diffusers", "transformers"):
            folder.component_class(name)


def _refuse_absent(folder: Folder, what: str) -> None:
    """Raises UserError for a component of a local folder that has no .safetensors."""
    for name in _MODULE_FOLDERS if Path(folder.path).is_dir() else ():
        if folder.lists(name) and not holds_weights(Path(folder.path), name):
            pickles = " as .safetensors (pickles can run code, so convert them)"
            some = any(Path(folder.path, name).glob("*.bin"))
            raise UserError(f"{what} has no weights of its {name}{pickles if some else ''}: give a whole one.")


def _weight_files(folder: Path) -> Iterator[Path]:
    """All .safetensors of a local folder's components; none of the hub's, whose files are not here yet."""
    for name in _MODULE_FOLDERS:
        yield from sorted((folder / name).glob("*.safetensors"))


def _refuse_weights(headers: list[Header]) -> None:
    """Raises UserError for weights in a form that diffusers would read wrongly without a word."""
    for header in headers:
        tensors.refuse_unknown(header)
        if tensors.has_scales(header):
            raise UserError(
                f"The model {shown(header.path)} is in scaled fp8, which is read from single files alone, not in a"
                f" diffusers folder: {tensors.FULLER}."
            )


def _variant(folder: Path) -> str | None:
    """What all weights of a component are marked with, such as fp16, where some component has no plain ones."""
    wanted: set[str] = set()
    for name in _MODULE_FOLDERS:
        files = [_WEIGHTS.fullmatch(path.stem) for path in (folder / name).glob("*.safetensors")]
        variants = {match["variant"] for match in files if match}
        if variants and None not in variants:
            wanted |= {str(variant) for variant in variants}
    return next((variant for variant in ("fp16", "bf16", *sorted(wanted)) if variant in wanted), None)


def _refuse_missing(pipe: Any, headers: list[Header], what: str) -> None:
    """Raises UserError where transformers made up a weight of a text encoder that no file has.

    Names are compared by their ends: versions of transformers differ in what stands before them.
    """
    for name, module in pipe.components.items():
        there = [key for header in headers if header.path.parent.name == name for key in header.tensors]
        if not name.startswith("text_encoder") or module is None or not there:
            continue
        ends = {_end(key) for key in there}
        parameters: dict[int, tuple[str, bool]] = {}  # by parameter, which may have several names
        for key, parameter in module.named_parameters(remove_duplicate=False):
            parameters[id(parameter)] = key, parameters.get(id(parameter), ("", False))[1] or _end(key) in ends
        lost = next((key for key, is_there in parameters.values() if not is_there), None)
        if lost is not None:
            raise UserError(f"{what} has no weights for {name}.{lost}: give a whole one.")


def _end(key: str) -> str:
    return re.sub(r"^(?:(?:text_model|language_model|model)\.)*", "", key)
