"""A custom node pack for tests: ComfyUI loads models of the published forms that are much smaller than the published.

What it otherwise takes as given is made small: the layers of the text encoders, the widths of networks that are not
read from their files, the VAE of films, and the part of Qwen2.5-VL that sees.
"""

from __future__ import annotations

import functools
from typing import Any

import comfy.ldm.modules.diffusionmodules.model
import comfy.ldm.wan.vae
import comfy.model_detection
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.text_encoders.hidream
from comfy.text_encoders.qwen_vl import Qwen2VLVisionTransformer

QWEN = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
TEXT_ENCODERS = {
    "clip_l_model_config": {"num_hidden_layers": 3, "intermediate_size": 64},
    "clip_g_model_config": {"num_hidden_layers": 3, "intermediate_size": 64},
    "t5xxl_model_config": {"num_layers": 1, "num_heads": 4, "d_ff": 64},
    "qwen25_7b_model_config": {**QWEN, "num_hidden_layers": 1},
    "qwen3_4b_model_config": {**QWEN, "num_hidden_layers": 3},  # of which the last but one is taken
    "llama_model_config": {**QWEN, "num_hidden_layers": 4},
    "umt5xxl_model_config": {"num_layers": 1, "num_heads": 4, "d_ff": 64, "vocab_size": 128},
}
HIDREAM = {
    "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "axes_dims_rope": [8, 4, 4], "caption_channels": [4096, QWEN["hidden_size"]], "llama_layers": [0, 1, 2, 3],
}  # fmt: skip
ZIMAGE = {  # the narrowest that ComfyUI's class builds as diffusers' does
    "dim": 1056, "n_refiner_layers": 1, "n_heads": 11, "n_kv_heads": 11, "axes_dims": [32, 32, 32],
    "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True,
    "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
_text_encoder = comfy.sd1_clip.SDClipModel.__init__
_detect = comfy.model_detection.detect_unet_config
_detect_text_encoder = comfy.sd.detect_te_model


@functools.wraps(_text_encoder)
def small_text_encoder(self: Any, *args: Any, model_options: Any = None, **kwargs: Any) -> None:
    if isinstance(kwargs.get("layer"), list):  # of Qwen3's 36, FLUX.2 klein takes three
        kwargs["layer"] = [0, 1, 2]
    _text_encoder(self, *args, model_options={**(model_options or {}), **TEXT_ENCODERS}, **kwargs)


def built_with(kind: type, **sizes: int) -> None:
    """All modules of this class are built with these sizes, whatever else was asked for."""
    build = kind.__init__

    @functools.wraps(build)
    def small(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **{**kwargs, **sizes})

    kind.__init__ = small


@functools.wraps(_detect)
def detect_widths(state: Any, prefix: str, *args: Any, **kwargs: Any) -> Any:
    found = _detect(state, prefix, *args, **kwargs)
    kind = found.get("image_model") if found else None
    if kind in ("flux", "chroma", "qwen_image"):
        width = state[f"{prefix}img_in.weight"].shape[0]
        heads = width // 128
    if kind in ("flux", "chroma"):
        found.update(hidden_size=width, num_heads=heads)
    if kind == "chroma":
        guidance = state[f"{prefix}distilled_guidance_layer.in_proj.weight"]
        found.update(out_dim=width, hidden_dim=guidance.shape[0])
    if kind == "qwen_image":
        texts = state[f"{prefix}txt_in.weight"].shape[1]
        found.update(num_attention_heads=heads, joint_attention_dim=texts)
    if kind == "lumina2":
        found.update(ZIMAGE)
    if kind == "hidream":
        found.update(HIDREAM)
    return found


@functools.wraps(_detect_text_encoder)
def detect_text_encoder(state: Any) -> Any:
    """By names alone, where ComfyUI goes by their number or by widths."""
    kinds = comfy.sd.TEModel
    if "encoder.block.0.layer.1.DenseReluDense.wi_1.weight" in state:
        return kinds.T5_XXL
    if "model.layers.0.self_attn.q_norm.weight" in state and hasattr(kinds, "QWEN3_4B"):
        return kinds.QWEN3_4B
    return _detect_text_encoder(state)


def load_hidreams(self: Any, state: Any) -> Any:
    """One of its four text encoders, by names and widths, where ComfyUI goes by the number of layers."""
    if "encoder.block.0.layer.1.DenseReluDense.wi_1.weight" in state:
        return self.t5xxl.load_sd(state)
    words = state.get("text_model.embeddings.token_embedding.weight")
    if words is None:
        return self.llama.load_sd(state)
    return (self.clip_l if words.shape[1] == 768 else self.clip_g).load_sd(state)


comfy.sd1_clip.SDClipModel.__init__ = small_text_encoder
comfy.model_detection.detect_unet_config = detect_widths
comfy.sd.detect_te_model = detect_text_encoder
comfy.text_encoders.hidream.HiDreamTEModel.load_sd = load_hidreams
built_with(comfy.ldm.wan.vae.WanVAE, dim=8)
for part in (comfy.ldm.modules.diffusionmodules.model.Encoder, comfy.ldm.modules.diffusionmodules.model.Decoder):
    built_with(part, ch=32)
built_with(Qwen2VLVisionTransformer, hidden_size=64, intermediate_size=64, num_heads=4, num_layers=1)
if hasattr(comfy.supported_models, "ZImage"):
    comfy.supported_models.ZImage.unet_config = {"image_model": "lumina2", "dim": ZIMAGE["dim"]}
NODE_CLASS_MAPPINGS: dict[str, Any] = {}
