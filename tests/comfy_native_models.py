"""Small random networks of every architecture in ComfyUI's own classes, and the CLIP and VAE that go with them."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))
import utils.install_util  # noqa: F401 - before another module that is called `utils` hides ComfyUI's

# isort: split
import comfy_lora

# isort: split
import comfy.latent_formats
import comfy.ldm.wan.vae
import comfy.model_patcher
import comfy.sd
import comfy.supported_models as supported
import comfy.taesd.taesd
import diffusers
import torch
from comfy_lora import CPU, Native
from torch import Tensor, nn

from dgpo_core.policy import Cond

SIDE = 16  # latent height and width
TOKENS = 7  # of every text
SDXL = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 6 * 256 + 32}
FLUX = {
    "patch_size": 1, "in_channels": 16, "num_layers": 3, "num_single_layers": 3, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}  # fmt: skip
QWEN = {
    "image_model": "qwen_image", "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 3,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 64, "cap_feat_dim": 32, "n_layers": 2,
    "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 2, "qk_norm": True, "axes_dims": [4, 6, 6],
    "axes_lens": [64, 64, 64],
}  # fmt: skip
ZIMAGE = {  # its modulation takes 256 numbers
    **LUMINA, "dim": 256, "n_kv_heads": 4, "axes_dims": [16, 24, 24], "z_image_modulation": True, "time_scale": 1000.0,
    "pad_tokens_multiple": 4,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 96, "out_dim": 16, "num_heads": 2, "ffn_dim": 128,
    "num_layers": 3, "text_dim": 32, "in_dim": 16,
}  # fmt: skip
AURA = {"max_seq": 64, "cond_seq_dim": 32, "n_double_layers": 2, "n_layers": 3, "dim": 64, "n_heads": 4}
WIDTHS = {"sdxl": (64, 32), "sd3": (64, 64)}
"""Of a text's tokens and of its pooled output, where they are not 32."""
CHANNELS = {"qwen": 16, "lumina": 16, "zimage": 16, "wan": 16}
"""Of the latents, where they are not 4."""
VIDEO = ("qwen", "wan")
"""Latents have a dimension of frames."""


class Clip:
    """Stands in for ComfyUI's CLIP: a text's tokens are noise that its letters seed."""

    def __init__(self, family: str) -> None:
        self.widths, self.layer_idx = WIDTHS.get(family, (32, 32)), None
        torch.manual_seed(0)
        self.patcher = comfy.model_patcher.ModelPatcher(nn.Linear(2, 2), CPU, CPU)

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list[Any]:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        tokens = torch.randn(1, TOKENS, self.widths[0], generator=torch.Generator().manual_seed(seed))
        rest = {
            "pooled_output": tokens[:, 0, :1].expand(1, self.widths[1]) * 0.1,
            "attention_mask": torch.ones(1, TOKENS, dtype=torch.long),
        }
        return [[tokens, rest]]

    def tensors(self, text: str) -> Cond:
        [[tokens, rest]] = self.encode_from_tokens_scheduled(text)
        return Cond({"tokens": tokens, "pooled": rest["pooled_output"]})


def network(family: str) -> Any:
    """In diffusers' classes, for the families that are converted."""
    torch.manual_seed(1)
    if family == "flux":
        return diffusers.FluxTransformer2DModel(**FLUX)
    if family == "sdxl":
        settings = {**comfy_lora.unet(sdxl=True).config, **SDXL}
        return diffusers.UNet2DConditionModel.from_config(settings)
    return comfy_lora.FAMILIES[family][0]()


def _converted(family: str) -> Native:
    built = network(family)
    made = comfy_lora.FAMILIES[family][1](built)
    made.model.latent_format = comfy.latent_formats.SD15()  # the small networks have four channels
    if family == "sdxl":
        sizes = torch.tensor([8 * SIDE, 8 * SIDE, 0, 0, 8 * SIDE, 8 * SIDE]).float()
        times = built.add_time_proj(sizes).reshape(1, -1)

        def call(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            y = torch.cat([cond["pooled"].expand(len(x), -1), times.expand(len(x), -1)], 1)
            return model(x, t, context=cond["tokens"], y=y)

        made.call = call
    return made


def _random(settings: Any, steps: float, **inputs: Any) -> Native:
    """A model of ComfyUI's with weights drawn anew; steps: of the engine's timesteps, for one of its network's."""
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}).eval()
    fill(model.diffusion_model, torch.Generator().manual_seed(1))
    return Native(model, lambda net, x, t, cond: net(x, t / steps, context=cond["tokens"], **inputs))


def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Matrices that keep the size of what they are given, and everything else near one (norms) or zero."""
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1 and name.endswith("weight"):
            noise = noise / value[0].numel() ** 0.5
        elif name.endswith("weight"):
            noise = 1 + 0.1 * noise
        else:
            noise = 0.1 * noise
        value.copy_(noise)


NATIVES: dict[str, Callable[[], Native]] = {
    **{family: functools.partial(_converted, family) for family in ("sd15", "sdxl", "sd3", "flux")},
    "qwen": lambda: _random(supported.QwenImage(dict(QWEN)), 1000),
    "lumina": lambda: _random(supported.Lumina2(dict(LUMINA)), 1000, num_tokens=TOKENS),
    "wan": lambda: _random(supported.WAN21_T2V(dict(WAN)), 1),
    "aura": lambda: _random(supported.AuraFlow(dict(AURA)), 1000),  # known to nothing in the pack
}
"""By family. Every call makes the same weights."""
if hasattr(supported, "ZImage"):
    NATIVES["zimage"] = lambda: _random(supported.ZImage(dict(ZIMAGE)), 1000, num_tokens=TOKENS)


def vae(family: str) -> Any:
    """A real VAE of ComfyUI's, as small as can be, with random weights."""
    generator = torch.Generator().manual_seed(4)
    if family in VIDEO:
        return _video_vae(generator)
    empty = comfy.taesd.taesd.TAESD(latent_channels=CHANNELS.get(family, 4)).state_dict()
    return comfy.sd.VAE(sd={key: 0.05 * torch.randn(v.shape, generator=generator) for key, v in empty.items()})


def _video_vae(generator: torch.Generator) -> Any:
    """Wan's, which is Qwen-Image's, too, of an eighth of the width."""
    own = comfy.ldm.wan.vae.WanVAE
    narrow = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "z_dim": 16, "dim": 8}
    small = functools.partial(own, **narrow, temperal_downsample=[False, True, True])
    whole = small()
    fill(whole, generator)
    comfy.ldm.wan.vae.WanVAE = lambda **settings: own(**{**settings, "dim": 8})  # 0.3.64 takes its width for granted
    try:
        return comfy.sd.VAE(sd=whole.state_dict())
    finally:
        comfy.ldm.wan.vae.WanVAE = own
