"""Models of real size with random weights whose prompts are read by a language model; see `random_model`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
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
from transformers import CLIPTextModelWithProjection

from dgpo_core.benchmark import random_parts as parts
from dgpo_core.common.packages import is_installed, missing
from dgpo_core.policy.families.qwenedit import QwenImageEdit
from dgpo_core.policy.families.sana import instruction

_ZIMAGE = {  # huggingface.co/Tongyi-MAI/Z-Image-Turbo, transformer/config.json
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "qk_norm": True,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
_QWENIMAGE = {  # huggingface.co/Qwen/Qwen-Image, transformer/config.json
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
}
_QWENIMAGE_LEVELS = {  # scheduler/scheduler_config.json
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
_QWEN25_VL = {  # text_encoder/config.json: the part that reads
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
_QWEN25_SIGHT = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
_QWEN25_PICTURE = {  # what stands for a picture in a prompt, and how the config calls it
    "<|vision_start|>": "vision_start_token_id",
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
    "<|vision_end|>": "vision_end_token_id",
}
_FLUX2_KLEIN = {  # huggingface.co/black-forest-labs/FLUX.2-klein-base-4B, transformer/config.json
    "patch_size": 1,
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32),
    "rope_theta": 2000,
    "guidance_embeds": False,
}
_DEPTHS = 28  # layers that a text model has at least whose states after 27 of them are taken
_QWEN3 = {  # config.json of huggingface.co/Qwen/Qwen3-4B: layers, heads, inner width
    2560: (36, 32, 9728),
}
_DC_AE = {  # huggingface.co/mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers, config.json; the rest as the class has it
    "encoder_block_types": (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3),
    "decoder_block_types": (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
_HIDREAM = {  # huggingface.co/HiDream-ai/HiDream-I1-Full, transformer/config.json
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 16,
    "num_single_layers": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "caption_channels": (4096, 4096),
    "text_emb_dim": 2048,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": (64, 32, 32),
    "max_resolution": (128, 128),
    "llama_layers": (*range(32), *(31,) * 16),
}
_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "head_dim": 128}  # config.json of Llama-3.1-8B, as what follows
_LLAMA_WHOLE = {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_LONG_CLIP = 218  # tokens that the pipeline takes for the most of both its CLIPs


def zimage(dtype: torch.dtype, device: torch.device | str, **overrides: Any) -> ZImagePipeline:
    """Z-Image: a transformer of 6.15 billion parameters, and Qwen3-4B."""
    transformer = parts.backbone(ZImageTransformer2DModel, _ZIMAGE | overrides, dtype, device)
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token, std=0.02)  # the class leaves them as they are in memory
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.vae(dtype, 16, device, scale=0.3611, shift=0.1159),
        text_encoder=_qwen3(2560, dtype, device),
        tokenizer=_talking(512),
    )


def qwenimage(dtype: torch.dtype, device: torch.device | str, **overrides: Any) -> QwenImagePipeline:
    """Qwen-Image: a transformer of 20.4 billion parameters, and Qwen2.5-VL-7B."""
    return _of_letters(QwenImagePipeline(**_qwenimage_parts(parts.tokenizer(512), dtype, device, overrides)))


def qwenimage_edit(dtype: torch.dtype, device: torch.device | str, **overrides: Any) -> QwenImageEditPlusPipeline:
    """Qwen-Image-Edit-2509: Qwen-Image's parts, and what shows pictures to Qwen2.5-VL."""
    for package in QwenImageEdit.needs:
        if not is_installed(package):
            raise missing("A model of the family qwen-image-edit", package)
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor  # imported late, as below

    tokenizer = parts.tokenizer(512)
    tokenizer.add_special_tokens({"additional_special_tokens": list(_QWEN25_PICTURE)})
    made = _qwenimage_parts(tokenizer, dtype, device, overrides)
    for token, name in _QWEN25_PICTURE.items():
        setattr(made["text_encoder"].config, name, tokenizer.convert_tokens_to_ids(token))
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(), tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor()
    )
    return _of_letters(QwenImageEditPlusPipeline(**made, processor=processor))


def _qwenimage_parts(
    tokenizer: Any, dtype: torch.dtype, device: torch.device | str, overrides: dict[str, Any]
) -> dict[str, Any]:
    with parts.place_of(device):
        vae = AutoencoderKLQwenImage().to(dtype)  # the class's own settings are the published ones
    return {
        "transformer": parts.backbone(QwenImageTransformer2DModel, _QWENIMAGE | overrides, dtype, device),
        "scheduler": FlowMatchEulerDiscreteScheduler(**_QWENIMAGE_LEVELS),
        "vae": vae,
        "text_encoder": _qwen25_vl(len(tokenizer), dtype, device),
        "tokenizer": tokenizer,
    }


def _of_letters(pipe: Any) -> Any:
    """With a short text around a prompt: theirs is of 34 or 64 tokens in Qwen's vocabulary, which are dropped again,
    and of many more in one of letters."""
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "user: {} assistant:", 0
    return pipe


def _qwen25_vl(words: int, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Qwen2.5-VL-7B; with storage, its width with one layer and so many words."""
    from transformers import (  # imported late: others need no new one
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    place, text, sight = parts.place_of(device), dict(_QWEN25_VL), dict(_QWEN25_SIGHT)
    if place.type != "meta":
        text |= {"vocab_size": words, "intermediate_size": 64, "num_hidden_layers": 1}
        text |= {"bos_token_id": 0, "eos_token_id": 0}
        sight |= {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sight, tie_word_embeddings=False)
    with place:
        return Qwen2_5_VLForConditionalGeneration(config).to(dtype)


def flux2_klein(dtype: torch.dtype, device: torch.device | str, **overrides: Any) -> Flux2KleinPipeline:
    """FLUX.2 klein 4B: a transformer of 3.88 billion parameters, and Qwen3-4B."""
    with parts.place_of(device):
        vae = AutoencoderKLFlux2().to(dtype)  # the class's own settings are the published ones
    return Flux2KleinPipeline(
        transformer=parts.backbone(Flux2Transformer2DModel, _FLUX2_KLEIN | overrides, dtype, device),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=_qwen3(2560, dtype, device, layers=_DEPTHS),
        tokenizer=_talking(512),
    )


def _talking(length: int) -> Any:
    """A tokenizer of letters for messages, which stands in for Qwen's."""
    made = parts.tokenizer(length)
    made.chat_template = "user: {% for message in messages %}{{ message['content'] }} {% endfor %}assistant:"
    return made


def _qwen3(width: int, dtype: torch.dtype, device: torch.device | str, layers: int = 1) -> Any:
    """The text model that has this width; with storage, of few layers."""
    from transformers import Qwen3Config, Qwen3Model  # imported late: others need no new transformers

    place = parts.place_of(device)
    layers, heads, inner = _QWEN3[width] if place.type == "meta" else (layers, 2, 64)
    config = Qwen3Config(
        vocab_size=151936 if place.type == "meta" else len(parts.tokenizer(512)),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8 if place.type == "meta" else 2,
        head_dim=128,
        max_position_embeddings=40960,
    )
    with place:
        return Qwen3Model(config).to(dtype)


def sana(dtype: torch.dtype, device: torch.device | str, **overrides: Any) -> SanaPipeline:
    """Sana 1.6B: a transformer of 1.60 billion parameters, and Gemma 2 2B."""
    with parts.place_of(device):
        vae = AutoencoderDC(**_DC_AE).to(dtype)
    tokenizer = parts.tokenizer(512, instruction(SanaPipeline))  # else it would be read letter by letter
    return SanaPipeline(
        # the class's own settings are those of huggingface.co/Efficient-Large-Model/Sana_1600M_1024px_diffusers
        transformer=parts.backbone(SanaTransformer2DModel, overrides, dtype, device),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=_gemma2(len(tokenizer), dtype, device),
        tokenizer=tokenizer,
    )


def _gemma2(words: int, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Gemma 2 2B, whose settings are those of transformers' class; with storage, its width with one layer."""
    from transformers import Gemma2Config, Gemma2Model  # imported late: others need no new transformers

    place = parts.place_of(device)
    small = {"vocab_size": words, "intermediate_size": 64, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Gemma2Config(**({} if place.type == "meta" else small))
    with place:
        return Gemma2Model(config).to(dtype)


def hidream(dtype: torch.dtype, device: torch.device | str, **overrides: Any) -> HiDreamImagePipeline:
    """HiDream-I1: a transformer of 17.1 billion parameters, two CLIPs, T5-XXL and Llama-3.1-8B."""
    widths = {"text_encoder": 768, "text_encoder_2": 1280}
    return HiDreamImagePipeline(
        transformer=parts.backbone(HiDreamImageTransformer2DModel, _HIDREAM | overrides, dtype, device),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.vae(dtype, 16, device, scale=0.3611, shift=0.1159),
        **{
            name: parts.clip(CLIPTextModelWithProjection, width, dtype, device, _LONG_CLIP)
            for name, width in widths.items()
        },
        text_encoder_3=parts.t5(dtype, device),
        text_encoder_4=_llama(dtype, device),
        **{name: parts.tokenizer(512) for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")},
    )


def _llama(dtype: torch.dtype, device: torch.device | str) -> Any:
    """Llama-3.1-8B; with storage, its width with as many narrow layers."""
    from transformers import LlamaConfig, LlamaForCausalLM  # imported late, as the others

    place = parts.place_of(device)
    small = {"vocab_size": len(parts.tokenizer(512)), "intermediate_size": 64}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(**_LLAMA, **(_LLAMA_WHOLE if place.type == "meta" else small))
    with place:
        return LlamaForCausalLM(config).to(dtype)
