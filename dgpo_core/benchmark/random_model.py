"""Real-size models with random weights: what an iteration costs does not depend on what the weights are.

Nothing is downloaded. Backbone and VAE have the published configurations in full. The text encoders have them where
nothing has storage (device "meta"); else they have the real output widths and token counts, but one small layer and a
vocabulary of letters: a prompt is encoded once per run, so they are no part of what is timed (nor, with offloading, of
the accelerator's memory).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dgpo_core.benchmark import random_parts as parts
from dgpo_core.benchmark.random_films import wan, wan_14b
from dgpo_core.benchmark.random_language import flux2_klein, hidream, qwenimage, qwenimage_edit, sana, zimage
from dgpo_core.common.errors import UserError
from dgpo_core.common.suggest import suggest
from dgpo_core.policy.families import FAMILIES
from dgpo_core.policy.loading.libraries import quiet
from dgpo_core.policy.loading.load import _dtype
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.policy.quantised import NONE, refuse_unavailable

_SD35M = {  # huggingface.co/stabilityai/stable-diffusion-3.5-medium, transformer/config.json
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}

_SD15 = {  # huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5, unet/config.json
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}

_SD21 = {  # stable-diffusion-2-1, which Stability has withdrawn: huggingface.co/sd2-community, unet/config.json
    **_SD15,
    "sample_size": 96,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}

_SDXL = {  # huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, unet/config.json
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

_FLUX = {  # huggingface.co/black-forest-labs/FLUX.1-dev, transformer/config.json
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}


def random_policy(
    name: str,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: tuple[str, ...] | None,
    dtype: str,
    device: torch.device,
    seed: int,
    offload: bool,
    quantize: str = NONE,
    quantize_text: str = NONE,
    offload_blocks: bool = False,
) -> DiffusersPolicy:
    """The model `name` of RANDOM_MODELS with random weights and fresh adapters; otherwise as `load_policy` gives it.

    dtype: a name in `load.DTYPES`; "auto" is bfloat16 on an accelerator and float32 on a CPU. seed: of the weights and
    of the adapters' start. Raises UserError for an unknown name.
    """
    if name not in RANDOM_MODELS:
        raise UserError(f"There is no random model {name}{suggest(name, RANDOM_MODELS)}")
    number = _dtype(dtype, device)
    torch.manual_seed(seed)
    with quiet():
        for kind in {quantize, quantize_text}:
            refuse_unavailable(kind, device)
        pipe = RANDOM_MODELS[name](number, device)
        cls = next(c for c in FAMILIES.values() if type(pipe).__name__ in c.pipeline_classes)
        return cls(
            pipe, rank=rank, alpha=alpha, dropout=dropout, targets=targets, dtype=number, device=device, seed=seed,
            offload=offload, quantize=quantize, quantize_text=quantize_text, offload_blocks=offload_blocks,
        )  # fmt: skip


# --- the models ------------------------------------------------------------------------------------------------------
# Each takes the number type, the backbone's device, and what to change in the backbone's config, for a smaller one. The
# other modules are made on the CPU, where `offload` wants them; the policy moves them where it does not.


def sd35m(dtype: torch.dtype, device: torch.device | str, **overrides: Any) -> StableDiffusion3Pipeline:
    """SD3.5-Medium: a transformer of 2.24 billion parameters."""
    return StableDiffusion3Pipeline(
        transformer=parts.backbone(SD3Transformer2DModel, _SD35M | overrides, dtype, device),
        # scheduler/scheduler_config.json of the same model card, as for the two below
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.vae(dtype, 16, device, scale=1.5305, shift=0.0609),
        text_encoder=parts.clip(CLIPTextModelWithProjection, 768, dtype, device),
        tokenizer=parts.tokenizer(77),
        text_encoder_2=parts.clip(CLIPTextModelWithProjection, 1280, dtype, device),
        tokenizer_2=parts.tokenizer(77),
        text_encoder_3=parts.t5(dtype, device),
        tokenizer_3=parts.tokenizer(512),
    )


def sd15(dtype: torch.dtype, device: torch.device | str, **overrides: Any) -> StableDiffusionPipeline:
    """SD1.5: a UNet of 0.86 billion parameters."""
    return _first(_SD15 | overrides, 768, "epsilon", dtype, device)


def sd21(dtype: torch.dtype, device: torch.device | str, **overrides: Any) -> StableDiffusionPipeline:
    """SD2.1 of 768 pixels, which predicts v: a UNet of 0.87 billion parameters, and OpenCLIP's text encoder."""
    return _first(_SD21 | overrides, 1024, "v_prediction", dtype, device)


def _first(
    unet: dict[str, Any], width: int, prediction: str, dtype: torch.dtype, device: torch.device | str
) -> StableDiffusionPipeline:
    """SD 1.x or 2.x. width: of the text encoder; prediction: in the scheduler's words."""
    return StableDiffusionPipeline(
        unet=parts.backbone(UNet2DConditionModel, unet, dtype, device),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type=prediction,
        ),
        vae=parts.vae(dtype, 4, device, scale=0.18215, upcast=False),
        text_encoder=parts.clip(CLIPTextModel, width, dtype, device),
        tokenizer=parts.tokenizer(77),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(dtype: torch.dtype, device: torch.device | str, **overrides: Any) -> StableDiffusionXLPipeline:
    """SDXL base 1.0: a UNet of 2.57 billion parameters."""
    return StableDiffusionXLPipeline(
        unet=parts.backbone(UNet2DConditionModel, _SDXL | overrides, dtype, device),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="epsilon",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        vae=parts.vae(dtype, 4, device, scale=0.13025),
        text_encoder=parts.clip(CLIPTextModel, 768, dtype, device),
        tokenizer=parts.tokenizer(77),
        text_encoder_2=parts.clip(CLIPTextModelWithProjection, 1280, dtype, device),
        tokenizer_2=parts.tokenizer(77),
        add_watermarker=False,
    )


def flux(
    dtype: torch.dtype, device: torch.device | str, pipeline: Callable[..., Any] = FluxPipeline, **overrides: Any
) -> Any:
    """FLUX.1-dev: a transformer of 11.9 billion parameters, with embedded guidance."""
    return pipeline(
        transformer=parts.backbone(FluxTransformer2DModel, _FLUX | overrides, dtype, device),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=parts.vae(dtype, 16, device, scale=0.3611, shift=0.1159),
        text_encoder=parts.clip(CLIPTextModel, 768, dtype, device),
        tokenizer=parts.tokenizer(77),
        text_encoder_2=parts.t5(dtype, device),
        tokenizer_2=parts.tokenizer(512),
    )


def kontext(dtype: torch.dtype, device: torch.device | str, **overrides: Any) -> FluxKontextPipeline:
    """FLUX.1-Kontext-dev: FLUX.1-dev's parts."""
    return flux(dtype, device, FluxKontextPipeline, **overrides)


def chroma(dtype: torch.dtype, device: torch.device | str, **overrides: Any) -> ChromaPipeline:
    """Chroma1: a transformer of 8.9 billion parameters, and T5-XXL."""
    return ChromaPipeline(
        # the class's own settings are those of huggingface.co/lodestones/Chroma1-HD, transformer/config.json
        transformer=parts.backbone(ChromaTransformer2DModel, overrides, dtype, device),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=parts.vae(dtype, 16, device, scale=0.3611, shift=0.1159),
        text_encoder=parts.t5(dtype, device),
        tokenizer=parts.tokenizer(512),
    )


RANDOM_MODELS: dict[str, Callable[..., Any]] = {
    "sd15": sd15,
    "sd21": sd21,
    "sd35m": sd35m,
    "sdxl": sdxl,
    "flux": flux,
    "kontext": kontext,
    "chroma": chroma,
    "flux2-klein": flux2_klein,
    "qwenimage": qwenimage,
    "qwen-image-edit": qwenimage_edit,
    "zimage": zimage,
    "sana": sana,
    "hidream": hidream,
    "wan": wan,
    "wan-14b": wan_14b,
}
"""Name -> builder of a diffusers pipeline from (dtype, device, **overrides of the backbone's config)."""
