"""Writes the network of a tiny pipeline as one file under its makers' names, as ComfyUI's diffusion_models are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_FLUX = [
    (r"^transformer_blocks\.(\d+)\.", r"double_blocks.\1."),
    (r"^single_transformer_blocks\.(\d+)\.", r"single_blocks.\1."),
    (r"^(single_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"^(single_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
    (r"^(double_blocks\.\d+)\.attn\.to_([qkv])\.", r"\1.img_attn.to_\2."),
    (r"\.attn\.add_([qkv])_proj\.", r".txt_attn.to_\1."),
]
_RULES: dict[str, list[tuple[str, str]]] = {
    "chroma": [
        (r"^x_embedder\.", "img_in."),
        (r"^context_embedder\.", "txt_in."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_1\.", r"\1.in_layer."),
        (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_2\.", r"\1.out_layer."),
        (r"^(distilled_guidance_layer\.norms\.\d+)\.weight", r"\1.scale"),
        *_FLUX,
        (r"\.ff\.net\.0\.proj\.", ".img_mlp.0."),
        (r"\.ff\.net\.2\.", ".img_mlp.2."),
        (r"\.ff_context\.net\.0\.proj\.", ".txt_mlp.0."),
        (r"\.ff_context\.net\.2\.", ".txt_mlp.2."),
        (r"^(single_blocks\.\d+)\.proj_out\.", r"\1.linear2."),
    ],
    "flux2": [
        (r"^x_embedder\.", "img_in."),
        (r"^context_embedder\.", "txt_in."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
        (r"^time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
        (r"^time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
        (r"_modulation(_\w+)?\.linear\.", r"_modulation\1.lin."),
        *_FLUX,
        (r"\.attn\.to_qkv_mlp_proj\.", ".linear1."),
        (r"^(single_blocks\.\d+)\.attn\.to_out\.", r"\1.linear2."),
        (r"\.ff\.linear_in\.", ".img_mlp.0."),
        (r"\.ff\.linear_out\.", ".img_mlp.2."),
        (r"\.ff_context\.linear_in\.", ".txt_mlp.0."),
        (r"\.ff_context\.linear_out\.", ".txt_mlp.2."),
    ],
    "hidream": [],
    "qwenimage": [],
    "wan": [
        (r"^condition_embedder\.(text|time)_embedder\.linear_1\.", r"\1_embedding.0."),
        (r"^condition_embedder\.(text|time)_embedder\.linear_2\.", r"\1_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^proj_out\.", "head.head."),
        (r"^scale_shift_table", "head.modulation"),
        (r"\.scale_shift_table", ".modulation"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"_attn\.to_([qkv])\.", r"_attn.\1."),
        (r"_attn\.to_out\.0\.", "_attn.o."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
        (r"\.norm2\.", ".norm3."),  # the one with weights
    ],
    "zimage": [
        (r"^all_(x_embedder|final_layer)\.2-1\.", r"\1."),
        (r"\.attention\.to_out\.0\.", ".attention.out."),
        (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
    ],
}


def _fused(match: re.Match[str]) -> str:
    return f"{match[1]}.qkv.{match[3]}" if match[1] else f"{match[2]}.linear1.{match[3]}"


_FUSED: dict[str, tuple[str, Any]] = {
    "chroma": (r"(?:(.*_attn)\.to_[qkv]|(single_blocks\.\d+)\.(?:attn\.to_[qkv]|proj_mlp))\.(\w+)", _fused),
    "flux2": (r"(.*_attn)\.to_[qkv]\.weight", r"\1.qkv.weight"),
    "zimage": (r"(.*\.attention)\.to_[qkv]\.weight", r"\1.qkv.weight"),
}
_SWAPPED = "final_layer.adaLN_modulation.1.weight"  # its makers have the shift first

FAMILIES = tuple(family for family in _RULES if family != "chroma")
"""Of which a tiny network can be written: Chroma's is known to diffusers in its published width alone."""


def write(family: str, pipe: Any, path: Path, prefix: str = "") -> Path:
    """The network alone, in `path` (.safetensors), and the whole model in the folder of its name beside it."""
    pipe.save_pretrained(path.with_suffix(""))
    state = named(family, pipe.transformer.state_dict())
    save_file({prefix + key: value.contiguous() for key, value in state.items()}, path)
    return path


def named(family: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network of diffusers' under its makers' names, q, k and v in one."""
    parts: dict[str, list[Tensor]] = {}
    for key, value in sorted(state.items(), key=lambda item: "proj_mlp" in item[0]):  # q, k, v and then the MLP
        name = key
        for pattern, to in _RULES[family]:
            name = re.sub(pattern, to, name)
        if family in _FUSED:
            name = re.sub(*_FUSED[family], name)
        parts.setdefault(name, []).append(value)
    whole = {name: torch.cat(values) if len(values) > 1 else values[0] for name, values in parts.items()}
    if family == "flux2":
        whole[_SWAPPED] = torch.cat(whole[_SWAPPED].chunk(2)[::-1])
    return whole
