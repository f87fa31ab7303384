"""A checkpoint for a ComfyUI in the form that is published, small and random, and a LoRA for it."""

from __future__ import annotations

import re
from types import SimpleNamespace

import single_file
import torch
from comfy_server import ComfyServer
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel


def checkpoint(comfy: ComfyServer) -> None:
    """A random SD1.5 of two short levels with a tiny VAE, and a LoRA for it."""
    levels = {"block_out_channels": (320, 320), "layers_per_block": 1, "cross_attention_dim": 768}
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=8, attention_head_dim=8, **levels, **kinds)
    with torch.device("meta"):
        names = CLIPTextModel(
            CLIPTextConfig(intermediate_size=3072, num_hidden_layers=12, hidden_size=768)
        ).state_dict()
    text = {key: torch.zeros(value.shape).half() for key, value in names.items()}  # all prompts mean the same
    pipe = SimpleNamespace(unet=unet.half(), vae=_with(_tiny_vae()), text_encoder=_with(text))
    single_file.write(pipe, comfy.base / "models" / "checkpoints" / "sd_v1-5.safetensors")
    query = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    parts = {"lora_A": torch.randn(4, 320), "lora_B": torch.randn(320, 4)}
    lora = {f"{query}.{part}.weight": value for part, value in parts.items()}
    save_file(lora, comfy.base / "models" / "loras" / "test_workflows.safetensors")


def _with(state: dict[str, Tensor]) -> SimpleNamespace:
    """What `single_file` asks of a module."""
    return SimpleNamespace(state_dict=lambda: state)


def _tiny_vae() -> dict[str, Tensor]:
    """Under the names of its authors' code, whose decoder has one more layer in front."""
    state = AutoencoderTiny().half().state_dict()
    named = {}
    for key, value in state.items():
        part, layer, rest = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", key).groups()
        named[f"taesd_{part}.{int(layer) + (part == 'decoder')}.{rest}"] = value
    return named
