"""Using and keeping LoRAs: DGPO LoRA Loader and Save LoRA."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import folder_paths
from comfy_api.v0_0_2 import io, ui

from dgpo_core.comfy.forms import NO_LORA
from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown
from dgpo_core.policy.lora import file as lora_file
from dgpo_core.policy.lora import keys as lora_keys
from dgpo_core.policy.lora import report as lora_report

from .common import fields, lora_model

_log = logging.getLogger(__name__)


class LoRALoader(io.ComfyNode):
    """Applies a LoRA file or a LORA_MODEL to a MODEL, and says what of it was applied."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_LoRALoader",
            display_name="DGPO LoRA Loader",
            category="DGPO/use",
            **fields.aliases("load lora", "apply lora"),
            description="Applies a LoRA of any trainer, and counts what fits: one that does not fit is an error.",
            inputs=[
                io.Model.Input("model", tooltip="The model to apply the LoRA to. It is not changed itself."),
                io.Clip.Input("clip", optional=True, tooltip="For LoRAs that change the text encoders too."),
                io.LoraModel.Input(
                    "lora", optional=True, display_name="trained LoRA", tooltip="It is used instead of the file."
                ),
                io.Combo.Input(
                    "lora_name",
                    display_name="LoRA file",
                    options=[NO_LORA, *folder_paths.get_filename_list("loras")],
                    default=NO_LORA,
                    tooltip="A .safetensors file in ComfyUI's loras folders; output/loras is one of them.",
                ),
                io.Float.Input(
                    "strength_model", default=1.0, min=-10.0, max=10.0, step=0.01, display_name="strength (model)",
                    tooltip="How much of the LoRA the model gets: 1 is as trained, 0 none of it.",
                ),
                io.Float.Input(
                    "strength_clip", default=1.0, min=-10.0, max=10.0, step=0.01, display_name="strength (CLIP)",
                    tooltip="How much of it the text encoders get.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA."),
                io.Clip.Output(display_name="clip", tooltip="The text encoders with the LoRA."),
                io.String.Output(display_name="info", tooltip="How much of the LoRA was applied, and its origin."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, lora_name: str | None = NO_LORA, lora: Any = "") -> bool | str:
        return lora is None or fields.first_error(
            lora_name=(_find_file, lora_name)
        )  # a connected LORA_MODEL is None here

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = NO_LORA, **_: Any) -> str:
        path = folder_paths.get_full_path("loras", lora_name) if lora_name else None
        return "" if path is None else f"{os.stat(path).st_mtime_ns} {os.stat(path).st_size}"

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        clip: Any = None,
        lora: Mapping[str, Any] | None = None,
    ) -> io.NodeOutput:
        name = lora_name if lora is None else "on the input"
        lora = lora_model.read(_find_file(lora_name)) if lora is None else lora
        return io.NodeOutput(*apply_lora(model, clip, lora, name, strength_model, strength_clip))


class SaveLoRA(io.ComfyNode):
    """Writes a LORA_MODEL to output/loras, under a new name each time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_SaveLoRA",
            display_name="Save LoRA",
            category="DGPO/use",
            **fields.aliases("save lora", "export"),
            description="Saves a trained LoRA to output/loras, where every LoRA loader finds it; overwrites nothing.",
            is_output_node=True,
            inputs=[
                io.LoraModel.Input("lora", tooltip="The trained LoRA."),
                io.String.Input(
                    "name",
                    default="dgpo/lora",
                    display_name="file name",
                    tooltip="Folder and name within output/loras; a number that counts up is added.",
                ),
                io.String.Input(
                    "metadata",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Lines key=value, added to what the file says of itself.",
                ),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="The file, as the LoRA loaders list it.")],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None, metadata: str | None = None) -> bool | str:
        return fields.first_error(name=(lora_model.check_name, name), metadata=(lora_model.parse_metadata, metadata))

    @classmethod
    def execute(cls, lora: Mapping[str, Any], name: str, metadata: str = "") -> io.NodeOutput:
        saved = save_lora(lora, name, lora_model.parse_metadata(metadata or ""))
        return io.NodeOutput(saved, ui=ui.PreviewText(saved))


def apply_lora(
    model: Any, clip: Any, lora: Mapping[str, Any], name: str, strength_model: float, strength_clip: float
) -> tuple[Any, Any, str]:
    """Clones of `model` and `clip` (or None) with the LoRA, and one line on what was applied.

    Raises UserError where no module of the LoRA fits. name: of the LoRA, for the messages.
    """
    lora_file.refuse_unusable(name, lora)
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = model.model.state_dict()
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
        weights = {**weights, **clip.cond_stage_model.state_dict()}
    state = comfy.lora_convert.convert_lora(dict(lora))
    shapes = {key: w.shape for key, w in weights.items() if w.is_floating_point()}  # integers: packed weights
    found = lora_keys.match(state, key_map, shapes)
    state = lora_keys.without(state, found.left_out)
    patches, unread = _patches(state, {**key_map, **found.targets})

    metadata = getattr(lora, "metadata", {})
    model, of_model = _patched(model, patches, strength_model)
    clip, of_clip = _patched(clip, patches, strength_clip)
    unread = {module: key for module, key in unread.items() if module in found.targets}
    parts = {m: keys for m, keys in lora_keys.modules(state).items() if m in found.targets and m not in unread}
    used = of_model | of_clip
    applied = sum(_changed(found.targets[module], keys) <= used for module, keys in parts.items())
    if not applied:
        raise UserError(lora_report.nothing_fits(name, found, unread, metadata, clip is not None))
    info = lora_report.report(found, applied, unread, metadata, clip is not None)
    _log.log(logging.INFO if applied == found.total else logging.WARNING, "LoRA %s: %s", shown(name), info)
    return model, clip, info


class _Read(dict[str, Any]):
    """A LoRA's tensors that notes which of them ComfyUI takes."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__(state)
        self.taken: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.taken.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.taken.add(key)
        return super().get(key, default)


def _patches(state: Mapping[str, Any], targets: Mapping[str, Any]) -> tuple[Mapping[Any, Any], dict[str, str]]:
    """ComfyUI's patches of the modules that it takes whole, and a key that it leaves of each of the others.

    A DoRA without its magnitudes or a layer without its bias would be another one than was trained.
    """
    read = _Read(state)
    patches = comfy.lora.load_lora(read, targets, log_missing=False)
    left = [(module, key) for module, parts in lora_keys.modules(state).items() for key in parts]
    unread = {module: key for module, key in left if key not in read.taken}
    if unread:
        patches = comfy.lora.load_lora(lora_keys.without(state, unread), targets, log_missing=False)
    return patches, unread


def _changed(target: lora_keys.Target, keys: Iterable[str]) -> set[Any]:
    """The targets of the patches that a module with these keys must have."""
    biases = [key for key in keys if key.endswith((".diff_b", ".b_norm"))]
    others = [key for key in keys if key not in biases and not lora_keys.is_alpha(key)]
    bias = f"{str(target).removesuffix('.weight')}.bias"
    return {*([target] if others else []), *([bias] if biases else [])}


def save_lora(lora: Mapping[str, Any], name: str, extra: Mapping[str, str]) -> str:
    """Saves the LoRA under output/loras and returns its name in the list of LoRAs."""
    root = os.path.join(folder_paths.get_output_directory(), "loras")
    folder_paths.add_model_folder_path("loras", root)  # ComfyUI does at its start; once is enough
    folder, stem, _, sub, _ = folder_paths.get_save_image_path(lora_model.check_name(name), root)
    folders = [Path(other) / sub for other in folder_paths.get_folder_paths("loras")]
    path = Path(folder) / lora_model.next_name(folders, stem)
    lora_model.write(path, lora, extra)
    return os.path.relpath(path, root)


def _patched(patcher: Any, patches: Mapping[Any, Any], strength: float) -> tuple[Any, set[Any]]:
    """A clone with those of the patches that are for it, and which these are."""
    if patcher is None:
        return None, set()
    patcher = patcher.clone()
    return patcher, set(patcher.add_patches(patches, strength))


def _find_file(name: str) -> str:
    """The path of a LoRA in the list; UserError where it is not there or no safetensors."""
    if name == NO_LORA:
        raise UserError("There is no LoRA: choose a file, or connect a trained LoRA.")
    if name not in folder_paths.get_filename_list("loras"):
        raise UserError(f"There is no LoRA {name} in ComfyUI's loras folders: choose one of the list.")
    lora_model.check_kind(name)
    return folder_paths.get_full_path_or_raise("loras", name)


NODES = [LoRALoader, SaveLoRA]
