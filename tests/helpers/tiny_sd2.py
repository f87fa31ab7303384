"""A tiny random SD 2.x, of 768 pixels (v) or 512 (epsilon): its text encoder is as wide as OpenCLIP's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import single_file
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_parts import MAX_TOKENS, tokenizer, vae
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

WIDTH = 1024
"""By which the LoRA is called one of SD 2.x."""
_LEVELS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "set_alpha_to_one": False,
}  # fmt: skip
_SCHEDULERS: dict[str, Any] = {  # scheduler/scheduler_config.json of stable-diffusion-2-1 and of -2-1-base
    "v": lambda: DDIMScheduler(**_LEVELS, clip_sample=False, prediction_type="v_prediction"),
    "epsilon": lambda: PNDMScheduler(**_LEVELS, skip_prk_steps=True, prediction_type="epsilon"),
}
_TO_OPEN_CLIP = [
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^final_layer_norm", "ln_final"),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"self_attn", "attn"),
    (r"layer_norm", "ln_"),
    (r"fc1", "c_fc"),
    (r"fc2", "c_proj"),
]


def sd2(folder: Path, prediction: str) -> StableDiffusionPipeline:
    """prediction: "v", as the model of 768 pixels, or "epsilon", as the base model."""
    torch.manual_seed(0)
    tok = tokenizer(folder / "tok")
    tok.pad_token = "z"  # another than the last token, as "!" is
    text = CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=16,
        hidden_act="gelu",
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=24 if prediction == "v" else 16,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        upcast_attention=True,
    )
    return StableDiffusionPipeline(
        unet=unet,
        scheduler=_SCHEDULERS[prediction](),
        vae=vae(4),
        text_encoder=CLIPTextModel(text),
        tokenizer=tok,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_file(pipe: StableDiffusionPipeline, path: Path) -> Path:
    """Saves `pipe` as one checkpoint whose text encoder has OpenCLIP's names, and the layer that SD 2.x leaves out."""
    state = load_file(single_file.write(pipe, path))
    state = {key: value for key, value in state.items() if not key.startswith("cond_stage_model.")}
    text = _open_clip(pipe.text_encoder.state_dict())
    text |= {re.sub(r"resblocks\.1\.", "resblocks.23.", key): value.clone() for key, value in text.items()}
    text |= {"text_projection": torch.eye(WIDTH), "logit_scale": torch.tensor(4.6)}
    save_file({**state, **{f"cond_stage_model.model.{key}": value for key, value in text.items()}}, path)
    return path


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a CLIP text model under OpenCLIP's names, q, k and v in one."""
    parts: dict[str, list[Tensor]] = {}
    for key, value in sorted(state.items(), key=lambda item: ["v_proj" in item[0], "k_proj" in item[0]]):
        name = key.removeprefix("text_model.")
        for pattern, to in _TO_OPEN_CLIP:
            name = re.sub(pattern, to, name)
        parts.setdefault(re.sub(r"[qkv]_proj\.(\w+)$", r"in_proj_\1", name), []).append(value)
    return {name: torch.cat(values).contiguous() for name, values in parts.items()}
