"""What kind of model a .safetensors file holds, by a table of marks in its header.

A family says in its own file by which marks a checkpoint of it is known. Here are all the other kinds that people have,
with what serves instead: a file is refused by the name of what it is, not by what some library misses in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown
from dgpo_core.policy.families import FAMILIES
from dgpo_core.policy.family import Family
from dgpo_core.policy.loading.header import Header
from dgpo_core.policy.loading.tensors import FULLER
from dgpo_core.policy.pipeline import DiffusersPolicy

NETWORK_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_NATIVE = "in ComfyUI, DGPO Policy (native) trains it"
_BASE = "take the model that it was made from"


@dataclass(frozen=True)
class Kind:
    """A kind of file that is not trained.

    name: after "is"; marks: names of tensors, without the network's prefix and with * for anything, each of which
    is enough; also: marks of which one must be there, too; unless: marks of which none may be there; instead: what to
    do.
    """

    name: str
    marks: tuple[str, ...]
    instead: str
    also: tuple[str, ...] = ("*",)
    unless: tuple[str, ...] = ()


_UNLIKE: tuple[Kind, ...] = (  # looked for before the families, which some of them resemble
    Kind(
        "a LoRA, not a model",
        ("*.lora_A.*", "*.lora_B.*", "*.lora_down.*", "*.lora_up.*", "*.lora.down.*", "*.lora.up.*", "lora_unet_*",
         "lora_te*", "*.hada_w1_a", "*.lokr_w1", "*.lokr_w1_a", "*.lora_linear_layer.*"),
        "give the model that it is for, and the LoRA as lora.init",
    ),
    Kind(
        "a textual inversion, not a model",
        ("emb_params", "string_to_param.*", "clip_g", "clip_l"),
        "give the model that it is for",
    ),
    Kind(
        "a ControlNet, not a model",
        ("control_model.*", "controlnet_cond_embedding.*", "controlnet_*", "input_hint_block.*", "zero_convs.*",
         "control_all_x_embedder.*", "control_layers.*"),
        "give the model that it is for",
    ),
    Kind("an IP-Adapter, not a model", ("ip_adapter.*", "image_proj.*"), "give the model that it is for"),
    Kind("quantised by bitsandbytes", ("*.quant_state.bitsandbytes__*", "*.absmax"), FULLER),
    Kind("quantised (GPTQ, AWQ or SVDQuant)", ("*.qweight", "*.wscales", "*.qzeros"), FULLER),
    Kind("quantised to 4 bits (nvfp4)", ("*.weight_scale_2",), FULLER),
    Kind("quantised in blocks", ("*.weight_scale_inv", "*.weight_block_scale*"), FULLER),
    Kind("Playground 2.5, an EDM model", ("edm_mean", "edm_std"), "take SDXL or a model that was made from it"),
    Kind("CosXL, an EDM model", ("edm_vpred.*",), "take SDXL or a model that was made from it"),
    Kind(
        "an SDXL refiner", ("label_emb.0.0.weight",), "take the SDXL base",
        also=("conditioner.embedders.0.model.*",), unless=("conditioner.embedders.1.*",),
    ),
    Kind("Kolors", ("encoder_hid_proj.*",), "take SDXL"),
    Kind("Stable Video Diffusion", ("*.time_stack.*", "*.time_mixer.*"), "take a model of single images"),
    Kind("AnimateDiff", ("*motion_modules.*",), "take the model that it is for"),
    Kind("an unCLIP model", ("noise_augmentor.*", "embedder.model.visual.*"), "take the SD2.1 that it was made from"),
    Kind("an upscaling model", ("low_scale_model.*", "body.0.rdb1.*", "model.1.sub.0.RDB1.*"), _BASE),
    Kind("Chroma Radiance, which has no VAE", ("nerf_blocks.*", "nerf_image_embedder.*"), _NATIVE),
    Kind("HunyuanVideo or HunyuanImage", ("txt_in.individual_token_refiner.*",), _NATIVE),
    Kind("AuraFlow", ("double_layers.0.attn.w1q.weight",), _NATIVE),
    Kind("Stable Cascade", ("clip_txt_mapper.*", "clip_txt_pooled_mapper.*", "clip_mapper.*", "clf.1.*"), _BASE),
    Kind("HunyuanDiT", ("mlp_t5.0.weight",), _NATIVE),
    Kind(
        "Sana as a single file", ("blocks.0.mlp.inverted_conv.*",),
        "take its diffusers folder (such as Efficient-Large-Model/Sana_1600M_1024px_diffusers)",
    ),
    Kind("PixArt", ("t_block.1.weight", "adaln_single.*"), _NATIVE, unless=("patchify_proj.*",)),
    Kind("Z-Image in pixel space", ("dec_net.*",), _NATIVE, also=("cap_embedder.*",)),
    Kind("Z-Image Omni, which edits images", ("siglip_embedder.*",), "take Z-Image"),
    Kind("Lumina 2", ("cap_embedder.*",), _NATIVE, unless=("cap_pad_token", "x_pad_token")),
    Kind("OmniGen 2", ("time_caption_embed.*",), _NATIVE),
    Kind("Qwen-Image 2.1", ("txt_in.text_norm.weight",), _NATIVE),
    Kind("Qwen-Image-Layered", ("time_text_embed.addition_t_embedding.weight",), "take Qwen-Image"),
    Kind("Qwen-Image-Edit-2511", ("__index_timestep_zero__",), "take its diffusers folder"),
    Kind("Mage or Lens", ("txt_norm.*",), _NATIVE, unless=("transformer_blocks.0.img_mod.1.weight",)),
    Kind(
        "a Wan that is shown a picture, a film or a voice",
        ("img_emb.*", "vace_blocks.*", "control_adapter.*", "ref_conv.*", "face_adapter.*", "audio_proj.*",
         "casual_audio_encoder.*", "patch_embedding_*"),
        "take Wan 2.1 T2V or Wan 2.2 TI2V-5B", also=("head.modulation",),
    ),
    Kind("Cosmos", ("x_embedder.proj.1.weight", "blocks.block0.*"), _NATIVE),
    Kind("Mochi", ("t5_yproj.weight",), "take a model of single images"),
    Kind("LTX-Video", ("patchify_proj.*",), "take a model of single images"),
    Kind("Stable Audio", ("transformer.rotary_pos_emb.inv_freq",), "take a model of images"),
)  # fmt: skip

_WHOLE = "give a whole checkpoint, or a diffusers folder"
_PARTS: tuple[Kind, ...] = (  # looked for where no family was found
    Kind(
        "the network alone, under diffusers' names",
        ("down_blocks.0.*", "transformer_blocks.0.*", "time_text_embed.*"),
        "give the diffusers folder that it is from",
    ),
    Kind(
        "a text encoder alone",
        ("text_model.*", "encoder.block.0.*", "shared.weight", "transformer.text_model.*", "cond_stage_model.*",
         "conditioner.*", "text_encoders.*", "model.layers.0.*", "token_embedding.weight", "transformer.resblocks.*"),
        _WHOLE,
    ),
    Kind("an image encoder alone", ("vision_model.*", "visual.*"), _WHOLE),
    Kind("a VAE alone", ("first_stage_model.*", "vae.*", "decoder.*", "encoder.*", "taesd_*"), _WHOLE),
)  # fmt: skip

_ARCHITECTURES = {  # parts of `modelspec.architecture`
    "refiner": ("an SDXL refiner", "take the SDXL base"),
    "inpaint": ("an inpainting model", _BASE),
    "/lora": ("a LoRA, not a model", "give the model that it is for, and the LoRA as lora.init"),
    "controlnet": ("a ControlNet, not a model", "give the model that it is for"),
    "textual-inversion": ("a textual inversion, not a model", "give the model that it is for"),
}
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def recognise(header: Header) -> str:
    """The family (a name in FAMILIES) of a single checkpoint. Raises UserError with the name of any other kind."""
    if _SHARD.search(header.path.name):
        raise _refused(header, "one part of several", "give the diffusers folder that they are from, or one whole file")
    names = tuple(name.removeprefix(_prefix(name)) for name in header.tensors)
    trained = {name for cls in FAMILIES.values() for name in cls.known_as}
    _refuse(header, [kind for kind in _UNLIKE if kind.name not in trained], names)
    family = next((f for f, cls in FAMILIES.items() if any(mark in names for mark in cls.marks)), None)
    if family is None:
        _refuse(header, _PARTS, names)
        raise UserError(
            f"{shown(header.path)} is not a checkpoint of any of the families {', '.join(FAMILIES)}: give one of"
            " those (in ComfyUI, DGPO Policy (native) trains most others)."
        )
    architecture = header.metadata.get("modelspec.architecture", "").lower()
    for mark, (name, instead) in _ARCHITECTURES.items():
        if mark in architecture:
            raise _refused(header, name, instead)
    told = f"{header.path.name} {architecture}".lower().replace("_", "-")
    family = next((f for f, cls in FAMILIES.items() if cls.looks_like == family and f in told), family)
    other = next((other for sign, other in FAMILIES[family].other_names.items() if sign in told), None)
    if other is not None:
        raise UserError(f"The model {shown(header.path)} is {other}.")
    refuse_channels(FAMILIES[family], _channels(FAMILIES[family], header), f"The model {shown(header.path)}")
    return family


def refuse_channels(cls: type[Family], channels: int | None, what: str) -> None:
    """Raises UserError where the network's first layer wants more than a noisy latent.

    channels: what it takes in, None where that is not known; what: begins the sentence, "The model x".
    """
    if channels is not None and channels in cls.other_inputs:
        raise UserError(f"{what} is {cls.other_inputs[channels]} ({channels} input channels): {_BASE}.")


def _channels(cls: type[Family], header: Header) -> int | None:
    entries: Mapping[str, tuple[int, ...]] = {
        name.removeprefix(_prefix(name)): entry.shape for name, entry in header.tensors.items()
    }
    shape = entries.get(cls.input_layer, ())
    return shape[1] if len(shape) > 1 else None


def _prefix(name: str) -> str:
    return next((prefix for prefix in NETWORK_PREFIXES if name.startswith(prefix)), "")


def _refuse(header: Header, kinds: Iterable[Kind], names: tuple[str, ...]) -> None:
    text = "\n".join(names)
    for kind in kinds:
        if _has(kind.marks, text) and _has(kind.also, text) and not _has(kind.unless, text):
            raise _refused(header, kind.name, kind.instead)


def _has(marks: Iterable[str], text: str) -> bool:
    """Whether one of the lines is one of the marks."""
    patterns = [re.escape(mark).replace(r"\*", ".*") for mark in marks]
    return bool(patterns) and re.search(f"^(?:{'|'.join(patterns)})$", text, re.MULTILINE) is not None


def _refused(header: Header, name: str, instead: str) -> UserError:
    return UserError(f"The model {shown(header.path)} is {name}, which cannot be trained here: {instead}.")


def family_class(own: str, asked: str | None, what: str) -> type[DiffusersPolicy]:
    """The class of a model's `own` family, or of the one that was asked for and that such files are of, too.

    Raises UserError, beginning with `what`, where another one was asked for.
    """
    if asked and FAMILIES[asked].looks_like == own:
        return FAMILIES[asked]
    if asked not in (None, own):
        raise UserError(f"{what} is of family {own}, not {asked}: set the family to {own} or auto.")
    return FAMILIES[own]
