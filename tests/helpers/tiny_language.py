"""Tiny random pipelines whose prompts are read by a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_parts import clip, film_vae, t5, talking, tokenizer, vae
from transformers import (
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3Model,
)


def qwen3(words: int, layers: int = 2) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Qwen3Model(config)


def zimage(folder: Path, **scheduler: Any) -> ZImagePipeline:
    """Z-Image; CLIP's tokenizer stands in for Qwen's."""
    torch.manual_seed(0)
    tok = talking(tokenizer(folder / "tok"))
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=32,
        axes_dims=[4, 2, 2],
        axes_lens=[64, 32, 32],
    )
    with torch.no_grad():  # the pad tokens are made empty, to be loaded
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.normal_(std=0.02)
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae(4, shift=0.1),
        text_encoder=qwen3(len(tok)),
        tokenizer=tok,
    )


def qwenimage(folder: Path, **scheduler: Any) -> QwenImagePipeline:
    """Qwen-Image; CLIP's tokenizer stands in for Qwen's."""
    torch.manual_seed(0)
    tok = tokenizer(folder / "tok")
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    text = {
        "vocab_size": len(tok), "bos_token_id": 0, "eos_token_id": 0, "hidden_size": 32,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    dynamic = {"shift": 1.0, "use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 256}
    return QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{**dynamic, "shift_terminal": 0.02, "max_shift": 0.9, **scheduler}),
        vae=film_vae(AutoencoderKLQwenImage),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=sight)),
        tokenizer=tok,
    )


SEEN = {
    "<|vision_start|>": "vision_start_token_id",
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
    "<|vision_end|>": "vision_end_token_id",
}
"""What stands for a picture in a prompt of Qwen2.5-VL, and how its config calls it."""


def qwenimage_edit(folder: Path, **scheduler: Any) -> QwenImageEditPlusPipeline:
    """Qwen-Image-Edit-2509: Qwen-Image's parts, and a processor that shows pictures to Qwen2.5-VL."""
    made = qwenimage(folder, **scheduler)
    tok, config = made.tokenizer, made.text_encoder.config
    tok.add_special_tokens({"additional_special_tokens": list(SEEN)})
    made.text_encoder.resize_token_embeddings(len(tok), mean_resizing=False)
    for token, name in SEEN.items():
        setattr(config, name, tok.convert_tokens_to_ids(token))
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(), tokenizer=tok, video_processor=Qwen2VLVideoProcessor()
    )
    return QwenImageEditPlusPipeline(**made.components, processor=processor)


def flux2(folder: Path, **scheduler: Any) -> Flux2KleinPipeline:
    """FLUX.2 klein, whose prompts are read at the depths 9, 18 and 27; CLIP's tokenizer stands in for Qwen's."""
    torch.manual_seed(0)
    tok = talking(tokenizer(folder / "tok"))
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    own_vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        own_vae.bn.running_mean.copy_(torch.linspace(-0.2, 0.2, 16))
        own_vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, "use_dynamic_shifting": True, **scheduler}),
        vae=own_vae,
        text_encoder=qwen3(len(tok), layers=28),
        tokenizer=tok,
    )


def sana(folder: Path, **scheduler: Any) -> SanaPipeline:
    """Sana, whose network also returns a spread and scales its timesteps; CLIP's tokenizer stands in for Gemma's."""
    torch.manual_seed(0)
    tok = tokenizer(folder / "tok")
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=16,
        timestep_scale=0.5,
    )
    blocks = {"block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8)}
    blocks |= {"layers_per_block": (1, 1), "qkv_multiscales": ((), (5,))}
    own_vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41407,
        **{f"{way}_{name}": value for way in ("encoder", "decoder") for name, value in blocks.items()},
    )
    config = Gemma2Config(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return SanaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**{**flow, **scheduler}),
        vae=own_vae,
        text_encoder=Gemma2Model(config),
        tokenizer=tok,
    )


def hidream(folder: Path, **scheduler: Any) -> HiDreamImagePipeline:
    """HiDream-I1, whose Llama has fewer layers than the network asks for; CLIP's tokenizer stands in for all four."""
    torch.manual_seed(0)
    tok = tokenizer(folder / "tok")
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[32, 32],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(32, 32),
        llama_layers=[0, 1, 2, 2],
    )
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return HiDreamImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae(4, shift=0.1),
        text_encoder=clip(tok, CLIPTextModelWithProjection, positions=128),
        tokenizer=tok,
        text_encoder_2=clip(tok, CLIPTextModelWithProjection, positions=128),
        tokenizer_2=tok,
        text_encoder_3=t5(len(tok)),
        tokenizer_3=tok,
        text_encoder_4=LlamaForCausalLM(config),
        tokenizer_4=tok,
    )
