"""Writes a tiny SD1.5 as one checkpoint, under the names that Stable Diffusion's own code gives its tensors."""

from __future__ import annotations

import re
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = [  # the tiny UNet: two levels, one layer each
    (r"time_embedding\.linear_1", "time_embed.0"),
    (r"time_embedding\.linear_2", "time_embed.2"),
    (r"conv_in\.", "input_blocks.0.0."),
    (r"conv_norm_out", "out.0"),
    (r"conv_out", "out.2"),
    (r"down_blocks\.(\d)\.resnets\.0", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.0"),
    (r"down_blocks\.(\d)\.attentions\.0", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.1"),
    (r"down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.0"),
    (r"up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.1"),
    (r"up_blocks\.0\.upsamplers\.0", "output_blocks.1.2"),
    (r"mid_block\.resnets\.0", "middle_block.0"),
    (r"mid_block\.attentions\.0", "middle_block.1"),
    (r"mid_block\.resnets\.1", "middle_block.2"),
]
_VAE = [  # the tiny VAE: two levels, one layer each
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{1 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]


def write(pipe: StableDiffusionPipeline, path: Path) -> Path:
    """Saves `pipe` to `path` (.safetensors)."""
    tensors = {}
    for key, value in pipe.unet.state_dict().items():
        if ".resnets." in key:
            key = re.sub("|".join(_RESNET), lambda m: _RESNET[m[0]], key)
        tensors["model.diffusion_model." + _rename(key, _UNET)] = value
    for key, value in pipe.vae.state_dict().items():
        tensors["first_stage_model." + _rename(key, _VAE)] = value
    for key, value in pipe.text_encoder.state_dict().items():
        tensors["cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")] = value
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def _rename(key: str, rules: list) -> str:
    for pattern, name in rules:
        key = re.sub("(?:^|(?<=\\.))" + pattern, name, key, count=1)
    return key
