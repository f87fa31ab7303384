"""Small random networks in diffusers' classes, and the same weights in ComfyUI's. Import `comfy_lora` first: it finds
both."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.flux.layers
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models as supported
import comfy.utils
import diffusers
import makers_layout
import tiny
import torch
from comfy.ldm.chroma.model import ChromaParams
from torch import Tensor

CPU = torch.device("cpu")
UNET = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (32, 64),
    "norm_num_groups": 32, "attention_head_dim": 4,
}  # fmt: skip
SD3 = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "attention_head_dim": 64, "num_attention_heads": 2, "joint_attention_dim": 64, "caption_projection_dim": 128,
    "pooled_projection_dim": 64, "pos_embed_max_size": 16,
}  # fmt: skip
ZIMAGE = {  # the narrowest that ComfyUI's class builds alike: its embedding of t and its rounding of widths
    "in_channels": 4, "dim": 1056, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 11, "n_kv_heads": 11,
    "cap_feat_dim": 32, "axes_dims": [32, 32, 32], "axes_lens": [64, 32, 32],
}  # fmt: skip
QWENIMAGE = {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
CHROMA = {  # of as many blocks as ComfyUI takes for granted
    "in_channels": 16, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8), "approximator_hidden_dim": 32, "approximator_layers": 2,
}  # fmt: skip
FLUX2 = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 96, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False,
}  # fmt: skip


@dataclass
class Native:
    """A network in ComfyUI's classes, and how it is called for a policy's prediction."""

    model: Any
    call: Callable[[Any, Tensor, Tensor, Any], Tensor]

    def patcher(self) -> Any:
        return comfy.model_patcher.ModelPatcher(self.model, load_device=CPU, offload_device=CPU)

    def predict(self, patcher: Any, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        comfy.model_management.load_models_gpu([patcher])
        with torch.no_grad():
            return self.call(patcher.model.diffusion_model, x, t, cond.tensors)


def unet(sdxl: bool) -> diffusers.UNet2DConditionModel:
    """With attention on the way down, in the middle and on the way up, as the published ones have it."""
    if not sdxl:
        kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 32}
        return diffusers.UNet2DConditionModel(**UNET, **kinds, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    return diffusers.UNet2DConditionModel(
        **UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )


def native_unet(network: Any, sdxl: bool) -> Native:
    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": [1, 2], "use_spatial_transformer": True, "legacy": False, "num_heads": 4,
        "num_head_channels": -1, "context_dim": network.config.cross_attention_dim, "adm_in_channels": None,
        "transformer_depth": [1, 0], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 0, 0],
        "use_linear_in_transformer": sdxl, "use_temporal_attention": False, "use_temporal_resblock": False,
    }  # fmt: skip
    if sdxl:
        depths = {"transformer_depth": [0, 2], "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 2, 2]}
        config.update(
            depths, num_classes="sequential", adm_in_channels=network.config.projection_class_embeddings_input_dim
        )
    settings = (supported.SDXL if sdxl else supported.SD15)(config)
    settings.unet_config.update(num_heads=4, num_head_channels=-1)
    names = comfy.utils.unet_to_diffusers(settings.unet_config)
    state = {names[key]: value for key, value in network.state_dict().items()}

    def call(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        y = None
        if sdxl:
            sizes = torch.tensor([tiny.SIZE, tiny.SIZE, 0, 0, tiny.SIZE, tiny.SIZE]).float()
            y = torch.cat([cond["pooled"], network.add_time_proj(sizes).reshape(1, -1)], 1)
        return model(x, t, context=cond["tokens"], y=y)

    return _native(settings, state, call)


def native_sd3(network: Any, dtype: torch.dtype = torch.float32) -> Native:
    """dtype: of the weights; they are cast to float32 where they are used."""
    state = comfy.model_detection.convert_diffusers_mmdit(_copy(network), "")
    settings = supported.SD3(comfy.model_detection.detect_unet_config(state, ""))
    return _native(settings, state, lambda model, x, t, cond: model(x, t, context=cond["tokens"],
                                                                   y=cond["pooled"]), dtype)  # fmt: skip


def native_flux(network: Any) -> Native:
    state = comfy.model_detection.convert_diffusers_mmdit(_copy(network), "")
    config = {  # what ComfyUI takes as given in all models of the family
        "in_channels": 4, "out_channels": 4, "context_in_dim": 32, "hidden_size": 32, "num_heads": 2,
        "axes_dim": [4, 4, 8],
    }  # fmt: skip
    config = {**comfy.model_detection.detect_unet_config(state, ""), **config}

    def call(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        guidance = torch.full((len(x),), 3.5)
        return model(x, t / 1000, cond["tokens"], y=cond["pooled"], guidance=guidance)

    return _native(supported.Flux(config), state, call)


def zimage() -> Any:
    network = diffusers.ZImageTransformer2DModel(**ZIMAGE)
    for token in (network.x_pad_token, network.cap_pad_token):
        torch.nn.init.normal_(token, std=0.02)
    return network


def native_zimage(network: Any) -> Native:
    state = comfy.model_detection.convert_diffusers_mmdit(_copy(network), "")
    config = {
        **ZIMAGE, "image_model": "lumina2", "patch_size": 2, "qk_norm": True, "rope_theta": 256.0,
        "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
    }  # fmt: skip

    def call(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return model(x, t / 1000, cond["tokens"], num_tokens=cond["tokens"].shape[1])

    return _native(supported.ZImage(config), state, call)


def qwenimage() -> Any:
    return diffusers.QwenImageTransformer2DModel(**QWENIMAGE)


def native_qwenimage(network: Any) -> Native:
    def call(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return model(x.unsqueeze(2), t / 1000, context=cond["tokens"]).squeeze(2)

    return _native(supported.QwenImage({"image_model": "qwen_image", **QWENIMAGE}), _copy(network), call)


def chroma() -> Any:
    return diffusers.ChromaTransformer2DModel(**CHROMA)


def native_chroma(network: Any) -> Native:
    config = {
        "image_model": "chroma", "in_channels": 16, "out_channels": 16, "context_in_dim": 32, "hidden_size": 32,
        "num_heads": 2, "depth": 19, "depth_single_blocks": 38, "axes_dim": [4, 4, 8], "theta": 10000, "patch_size": 2,
        "mlp_ratio": 4.0, "qkv_bias": True, "in_dim": 64, "out_dim": 32, "hidden_dim": 32, "n_layers": 2,
        "txt_ids_dims": [], "vec_in_dim": None,
    }  # fmt: skip
    known = {"image_model", *ChromaParams.__dataclass_fields__}  # an older ComfyUI has fewer
    config = {key: value for key, value in config.items() if key in known}

    def call(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return model(x, t / 1000, cond["tokens"], guidance=torch.zeros(len(x)))

    return _native(supported.Chroma(config), _of_makers("chroma", network), call)


def _of_makers(family: str, network: Any) -> dict[str, Tensor]:
    """Under the makers' names, but for norms, whose scales newer ComfyUIs call weights."""
    state = makers_layout.named(family, _copy(network))
    if getattr(comfy.ldm.flux.layers, "RMSNorm", None):  # newer ones have None of that name
        return state
    return {re.sub(r"\.scale$", ".weight", key): value for key, value in state.items()}


def flux2() -> Any:
    return diffusers.Flux2Transformer2DModel(**FLUX2)


def native_flux2(network: Any) -> Native:
    state = _of_makers("flux2", network)
    config = {
        "image_model": "flux2", "in_channels": 16, "out_channels": 16, "context_in_dim": 96, "hidden_size": 32,
        "num_heads": 2, "depth": 1, "depth_single_blocks": 2, "axes_dim": [4, 4, 4, 4], "theta": 2000, "patch_size": 1,
        "mlp_ratio": 3.0, "qkv_bias": False, "guidance_embed": False, "global_modulation": True, "vec_in_dim": None,
        "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
        "txt_ids_dims": [3],
    }  # fmt: skip

    def call(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return model(x, t / 1000, cond["tokens"])

    return _native(supported.Flux2(config), state, call)


def native_hidream(network: Any) -> Native:
    def call(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return model(x, t, y=cond["pooled"], context=cond["tokens"], encoder_hidden_states_llama3=cond["layers"])

    config = {key: value for key, value in network.config.items() if not key.startswith(("_", "force_"))}
    return _native(supported.HiDream({"image_model": "hidream", **config}), _copy(network), call)


def native_wan(network: Any) -> Native:
    own = network.config
    config = {
        "image_model": "wan2.1", "model_type": "t2v", "in_dim": own.in_channels, "out_dim": own.out_channels,
        "dim": own.num_attention_heads * own.attention_head_dim, "num_heads": own.num_attention_heads,
        **{name: own[name] for name in ("ffn_dim", "freq_dim", "text_dim", "num_layers", "cross_attn_norm", "eps")},
    }  # fmt: skip

    def call(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return model(x.unsqueeze(2), t, context=cond["tokens"]).squeeze(2)

    return _native(supported.WAN21_T2V(config), makers_layout.named("wan", _copy(network)), call)


def _native(
    settings: Any, state: dict[str, Tensor], call: Callable[..., Tensor], dtype: torch.dtype = torch.float32
) -> Native:
    settings.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    model = settings.get_model({})
    missing, unexpected = model.diffusion_model.load_state_dict(state, strict=False)
    assert not missing, f"not converted: {missing}"
    assert not unexpected, f"not known: {unexpected}"
    return Native(model.eval(), call)


def _copy(network: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


FAMILIES: dict[str, tuple[Callable[[], Any] | None, Callable[[Any], Native]]] = {
    "sd15": (lambda: unet(sdxl=False), lambda network: native_unet(network, sdxl=False)),
    "sdxl": (lambda: unet(sdxl=True), lambda network: native_unet(network, sdxl=True)),
    "sd3": (lambda: diffusers.SD3Transformer2DModel(**SD3), native_sd3),
    "sd3.5": (
        lambda: diffusers.SD3Transformer2DModel(**SD3, qk_norm="rms_norm", dual_attention_layers=(0,)),
        native_sd3,
    ),
    "flux": (None, native_flux),
    **({"chroma": (chroma, native_chroma)} if hasattr(supported, "Chroma") else {}),
    **({"flux2": (flux2, native_flux2)} if hasattr(supported, "Flux2") else {}),
    **({"qwenimage": (qwenimage, native_qwenimage)} if hasattr(supported, "QwenImage") else {}),
    **({"zimage": (zimage, native_zimage)} if hasattr(supported, "ZImage") else {}),
    "hidream": (None, native_hidream),
    "wan": (None, native_wan),
    "embedded": (None, native_sd3),
}
"""How the diffusers network is made (None: as it is) and put into ComfyUI's class."""
