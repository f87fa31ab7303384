"""Tiny random pipelines of every family, made on the spot: nothing is downloaded and a forward takes milliseconds."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
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
from tiny_films import wan
from tiny_language import flux2, hidream, qwenimage, qwenimage_edit, sana, zimage
from tiny_parts import MAX_TOKENS, SIZE, tokenizer  # noqa: F401 - and for the tests
from tiny_parts import clip as _clip
from tiny_parts import t5 as _t5
from tiny_parts import vae as _vae
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
)

from dgpo_core.common.prompts import Prompt
from dgpo_core.common.source import Source
from dgpo_core.policy import Cond, load_policy
from dgpo_core.policy.pipeline import DiffusersPolicy

PROMPTS = ["a red circle", "two blue squares"]


def sd3(folder: Path, **scheduler: Any) -> StableDiffusion3Pipeline:
    """SD3 without T5; two blocks, so that the last one (no `to_add_out`) and an ordinary one are both there."""
    torch.manual_seed(0)
    tok = tokenizer(folder / "tok")
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=16,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=_vae(4, shift=0.1),
        text_encoder=_clip(tok, CLIPTextModelWithProjection),
        tokenizer=tok,
        text_encoder_2=_clip(tok, CLIPTextModelWithProjection),
        tokenizer_2=tok,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def unet(sdxl: bool, layers_per_block: int = 1) -> UNet2DConditionModel:
    """The tiny UNet of SD1.5 or SDXL; the published ones have two layers per block."""
    extra: dict[str, Any] = {}
    if sdxl:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
            "use_linear_projection": True,
        }
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=layers_per_block,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=64 if sdxl else 32,
        attention_head_dim=4,
        **extra,
    )


_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def sd15(folder: Path, **scheduler: Any) -> StableDiffusionPipeline:
    """SD1.5; pass `prediction_type="v_prediction"` for a v model."""
    torch.manual_seed(0)
    tok = tokenizer(folder / "tok")
    return StableDiffusionPipeline(
        unet=unet(sdxl=False),
        scheduler=DDIMScheduler(**{**_BETAS, "clip_sample": False, "set_alpha_to_one": False, **scheduler}),
        vae=_vae(4),
        text_encoder=_clip(tok),
        tokenizer=tok,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(folder: Path, **scheduler: Any) -> StableDiffusionXLPipeline:
    """SDXL, with Euler's scheduler config as SDXL base has it."""
    torch.manual_seed(0)
    tok = tokenizer(folder / "tok")
    return StableDiffusionXLPipeline(
        unet=unet(sdxl=True),
        scheduler=EulerDiscreteScheduler(**{**_BETAS, "timestep_spacing": "leading", **scheduler}),
        vae=_vae(4),
        text_encoder=_clip(tok),
        tokenizer=tok,
        text_encoder_2=_clip(tok, CLIPTextModelWithProjection),
        tokenizer_2=tok,
        add_watermarker=False,
    )


def flux(folder: Path, cls: type = FluxPipeline, **scheduler: Any) -> Any:
    """Flux dev (with embedded guidance); CLIP's tokenizer stands in for T5's."""
    torch.manual_seed(0)
    tok = tokenizer(folder / "tok")
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    dynamic = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 256}
    return cls(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{**dynamic, **scheduler}),
        vae=_vae(4, shift=0.1),
        text_encoder=_clip(tok),
        tokenizer=tok,
        text_encoder_2=_t5(len(tok)),
        tokenizer_2=tok,
    )


def kontext(folder: Path, **scheduler: Any) -> Any:
    """FLUX.1 Kontext: Flux's parts in the pipeline that edits."""
    return flux(folder, FluxKontextPipeline, **scheduler)


EDITORS = {"kontext": kontext, "qwen-image-edit": qwenimage_edit}


def chroma(folder: Path, **scheduler: Any) -> ChromaPipeline:
    """Chroma; CLIP's tokenizer stands in for T5's."""
    torch.manual_seed(0)
    tok = tokenizer(folder / "tok")
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=64,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 1.0, **scheduler}),
        vae=_vae(4, shift=0.1),
        text_encoder=_t5(len(tok)),
        tokenizer=tok,
    )


BUILDERS = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "chroma": chroma,
    "flux2": flux2,
    "qwenimage": qwenimage,
    "zimage": zimage,
    "sana": sana,
    "hidream": hidream,
    "wan": wan,
}


UNUSED = dict.fromkeys(("qwenimage", "qwen-image-edit"), ("transformer_blocks.1.attn.to_add_out",))
"""By family, modules of its last block that nothing of the picture depends on, so that they get no gradient."""


def used(policy: DiffusersPolicy) -> dict[str, Tensor]:
    """The trainable parameters that a prediction depends on."""
    unused = UNUSED.get(policy.family, ())
    return {key: p for key, p in policy.trainable().items() if not key.startswith(unused or ("?",))}


def can_be_built(family: str) -> bool:
    """Whether the packages are there that it needs."""
    if family != "qwen-image-edit":
        return True
    try:
        import torchvision  # noqa: F401 - beside another torch than its own it raises all sorts of errors
    except Exception:
        return False
    return True


def require(family: str) -> None:
    """Skips the test where the family cannot be built."""
    if not can_be_built(family):
        pytest.skip(f"The family {family} needs torchvision.")


def build(family: str, folder: Path, **scheduler: Any) -> Any:
    """A tiny pipeline; folder: where its tokenizers' files are written. Skips the test where it cannot be built."""
    require(family)
    return (BUILDERS | EDITORS)[family](folder, **scheduler)


def save(family: str, folder: Path, **scheduler: Any) -> Path:
    """Builds a tiny pipeline and saves it in diffusers format; the folder to load."""
    path = folder / family
    build(family, folder, **scheduler).save_pretrained(path)
    return path


@functools.cache
def folder(family: str) -> Path:
    """The saved tiny model of a family, made once for all tests; they only read it."""
    root = Path(tempfile.mkdtemp(prefix="dgpo-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return save(family, root)


@functools.cache
def shared(family: str) -> DiffusersPolicy:
    """A policy of a family, of rank 2 and with a fresh adapter, for the tests that leave it as it was."""
    return load_policy(folder(family), rank=2)


def inputs(policy: DiffusersPolicy) -> tuple[Tensor, Tensor, Cond]:
    """Noisy latents, two timesteps and the prompts (with a picture, where the model edits), for a prediction; always
    the same."""
    x = torch.randn(2, *policy.latent_shape(SIZE, SIZE), generator=torch.Generator().manual_seed(2))
    conds, _ = policy.condition(prompts(policy.family), "", (SIZE, SIZE))
    return x, torch.tensor([900.0, 300.0]), Cond.cat(conds)


def prompts(family: str) -> list[Prompt]:
    """`PROMPTS`; each with a grey picture, where the family edits."""
    sources = (Source.of_pixels(torch.full((3, SIZE, SIZE), 0.5)),) if family in EDITORS else ()
    return [Prompt(text, sources=sources) for text in PROMPTS]
