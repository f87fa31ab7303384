"""Small random networks of every architecture in ComfyUI's own classes, and the CLIP and VAE that go with them."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))
import utils.install_util  # noqa: F401 - before another module that is called `utils` hides ComfyUI's

# isort: split
import comfy_lora  # noqa: F401 - it finds ComfyUI

# isort: split
import comfy.latent_formats
import comfy.ldm.wan.vae
import comfy.model_patcher
import comfy.sd
import comfy.supported_models as supported
import comfy.taesd.taesd
import comfy.utils
import comfy_networks
import diffusers
import torch
from comfy_networks import CPU, Native
from torch import Tensor, nn

from dgpo_core.policy import Cond

FP8 = torch.float8_e4m3fn
SCALED = "scaled_fp8"
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
HIDREAM = {
    "image_model": "hidream", "patch_size": 2, "in_channels": 16, "num_layers": 2, "num_single_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": [32, 32], "text_emb_dim": 32,
    "axes_dims_rope": (8, 4, 4), "llama_layers": [0, 1, 2, 2],
}  # fmt: skip
AURA = {"max_seq": 64, "cond_seq_dim": 32, "n_double_layers": 2, "n_layers": 3, "dim": 64, "n_heads": 4}
WIDTHS = {"sdxl": (64, 32), "sd3": (64, 64)}
"""Of a text's tokens and of its pooled output, where they are not 32."""
CHANNELS = {"qwen": 16, "lumina": 16, "zimage": 16, "hidream": 16, "wan": 16}
"""Of the latents, where they are not 4."""
VIDEO = ("qwen", "wan")
"""Latents have a dimension of frames."""


class Clip:
    """Stands in for ComfyUI's CLIP: a text's tokens are noise that its letters seed."""

    def __init__(self, family: str) -> None:
        self.widths, self.layer_idx = WIDTHS.get(family, (32, 32)), None
        self.masked, self.layered = family in ("lumina", "zimage"), family == "hidream"
        torch.manual_seed(0)
        self.patcher = comfy.model_patcher.ModelPatcher(nn.Linear(2, 2), CPU, CPU)

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list[Any]:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        tokens = torch.randn(1, TOKENS, self.widths[0], generator=torch.Generator().manual_seed(seed))
        rest = {"pooled_output": tokens[:, 0, :1].expand(1, self.widths[1]) * 0.1}
        if self.masked:
            rest["attention_mask"] = torch.ones(1, TOKENS, dtype=torch.long)
        if self.layered:
            rest["conditioning_llama3"] = torch.stack([tokens.roll(i + 1, 1) for i in range(3)], 1)
        return [[tokens, rest]]

    def tensors(self, text: str) -> Cond:
        [[tokens, rest]] = self.encode_from_tokens_scheduled(text)
        layers = {"layers": rest["conditioning_llama3"]} if self.layered else {}
        return Cond({"tokens": tokens, "pooled": rest["pooled_output"], **layers})


def network(family: str) -> Any:
    """In diffusers' classes, for the families that are converted."""
    torch.manual_seed(1)
    if family == "flux":
        return diffusers.FluxTransformer2DModel(**FLUX)
    if family == "sdxl":
        settings = {**comfy_networks.unet(sdxl=True).config, **SDXL}
        return diffusers.UNet2DConditionModel.from_config(settings)
    return comfy_networks.FAMILIES[family][0]()


def _converted(family: str) -> Native:
    built = network(family)
    made = comfy_networks.FAMILIES[family][1](built)
    made.model.latent_format = comfy.latent_formats.SD15()  # the small networks have four channels
    if family == "sdxl":
        sizes = torch.tensor([8 * SIDE, 8 * SIDE, 0, 0, 8 * SIDE, 8 * SIDE]).float()
        times = built.add_time_proj(sizes).reshape(1, -1)

        def call(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            y = torch.cat([cond["pooled"].expand(len(x), -1), times.expand(len(x), -1)], 1)
            return model(x, t, context=cond["tokens"], y=y)

        made.call = call
    return made


@dataclass(frozen=True)
class Plan:
    """A network of ComfyUI's that is drawn anew: its settings and how it is called.

    steps: how many of the engine's timesteps are one of its own. texts: what it calls further parts of a text.
    """

    settings: Callable[[], Any]
    steps: float = 1000
    inputs: tuple[tuple[str, Any], ...] = ()
    texts: tuple[tuple[str, str], ...] = ()

    def random(self) -> Native:
        """In float32. Every call makes the same weights."""
        settings = self.settings()
        settings.set_inference_dtype(torch.float32, None)
        made = self.native(settings)
        fill(made.model.diffusion_model, torch.Generator().manual_seed(1))
        return made

    def kept(self, kind: str, weights: dict[str, Tensor]) -> Native:
        """With these weights as a file has them in "bfloat16", "float8_e4m3fn" or SCALED; computes in float32."""
        settings, state = self.settings(), weights
        if kind == SCALED:
            state = scaled(weights)
            if hasattr(comfy.utils, "convert_old_quants"):
                state, _ = comfy.utils.convert_old_quants(state)
                settings.quant_config = comfy.utils.detect_layer_quantization(state, "")
            else:
                settings.scaled_fp8 = state.pop("scaled_fp8").dtype
        settings.set_inference_dtype(torch.float32 if kind == SCALED else getattr(torch, kind), torch.float32)
        made = self.native(settings)
        missing, unexpected = made.model.diffusion_model.load_state_dict(state, strict=False)
        assert not unexpected, unexpected
        assert not [key for key in missing if "scale_" not in key], missing
        return made

    def native(self, settings: Any) -> Native:
        def call(net: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            texts = {name: cond[part] for name, part in self.texts}
            return net(x, t / self.steps, context=cond["tokens"], **dict(self.inputs), **texts)

        return Native(settings.get_model({}).eval(), call)


def scaled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As scaled fp8 files hold them: every Linear's largest weight is the largest number of the type."""
    state = {"scaled_fp8": torch.zeros(2, dtype=FP8)}  # two elements: products in full precision
    for key, value in weights.items():
        if value.ndim == 2 and key.endswith(".weight") and not key.endswith("gate.weight"):  # which is no Linear's
            scale = value.abs().max() / torch.finfo(FP8).max
            state[key] = (value / scale).to(FP8)
            state[key.replace(".weight", ".scale_weight")] = scale
        else:
            state[key] = value
    return state


@torch.no_grad()
def stands_for(network: nn.Module) -> dict[str, Tensor]:
    """The numbers that a network's weights are, however they are kept, in float32."""
    found = {}
    for name, module in network.named_modules():
        for key, value in module._parameters.items():
            if value is None or key.startswith("scale_"):
                continue
            value = (value.dequantize() if "Quantized" in type(value).__name__ else value).float()
            scale = getattr(module, "scale_weight", None) if key == "weight" else None
            found[f"{name}.{key}".lstrip(".")] = value if scale is None else value * scale
    return found


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


_TOKENS = (("num_tokens", TOKENS),)
_LAYERS = (("y", "pooled"), ("encoder_hidden_states_llama3", "layers"))
PLANS = {
    "qwen": Plan(lambda: supported.QwenImage(dict(QWEN))),
    "lumina": Plan(lambda: supported.Lumina2(dict(LUMINA)), inputs=_TOKENS),
    "hidream": Plan(lambda: supported.HiDream(dict(HIDREAM)), steps=1, texts=_LAYERS),
    "wan": Plan(lambda: supported.WAN21_T2V(dict(WAN)), steps=1),
    "aura": Plan(lambda: supported.AuraFlow(dict(AURA))),  # known to nothing in the pack
}
if hasattr(supported, "ZImage"):
    PLANS["zimage"] = Plan(lambda: supported.ZImage(dict(ZIMAGE)), inputs=_TOKENS)
NATIVES: dict[str, Callable[[], Native]] = {
    **{family: functools.partial(_converted, family) for family in ("sd15", "sdxl", "sd3", "flux")},
    **{family: plan.random for family, plan in PLANS.items()},
}
"""By family. Every call makes the same weights."""


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
