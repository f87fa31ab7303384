"""Run in ComfyUI's folder and interpreter: writes small random models under the names that the shared workflows expect.

MODELS is the folder to write into; ComfyUI loads them where the pack `small_models` is installed. Prints their names.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import comfy_lora  # noqa: F401 - it finds ComfyUI

# isort: split
import small_models

# isort: split
import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.model_detection
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models as supported
import comfy.taesd.taesd
import comfy.text_encoders.hunyuan_video
import comfy.text_encoders.wan
import comfy_networks
import diffusers
import makers_layout
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True,
    "legacy": False, "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
SD15 = {
    **UNET, "num_res_blocks": [1, 1], "channel_mult": [1, 1], "transformer_depth": [1, 1],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1], "context_dim": 768,
    "adm_in_channels": None, "use_linear_in_transformer": False,
}  # fmt: skip
SDXL = {  # of the shortest relative that ComfyUI takes for an SDXL
    **UNET, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 1, 1], "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": 1, "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "context_dim": 2048,
    "num_classes": "sequential", "adm_in_channels": 2816, "use_linear_in_transformer": True,
}  # fmt: skip
SD35 = {
    **comfy_networks.SD3, "in_channels": 16, "out_channels": 16, "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048, "qk_norm": "rms_norm", "dual_attention_layers": (0,),
}  # fmt: skip
FLUX = {
    "patch_size": 1, "in_channels": 64, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 128,
    "num_attention_heads": 1, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56), "guidance_embeds": True,
}  # fmt: skip
CHROMA = {  # of as many blocks as ComfyUI takes for granted
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 1,
    "joint_attention_dim": 4096, "axes_dims_rope": (16, 56, 56), "approximator_hidden_dim": 32,
}  # fmt: skip
QWENIMAGE = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 1, "attention_head_dim": 128,
    "num_attention_heads": 1, "joint_attention_dim": small_models.QWEN["hidden_size"], "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
FLUX2 = {
    "in_channels": 128, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1,
    "joint_attention_dim": 3 * small_models.QWEN["hidden_size"], "axes_dims_rope": (32, 32, 32, 32),
    "guidance_embeds": False,
}  # fmt: skip
VAE = {  # FLUX.2's, as wide as the pack `small_models` builds it
    "double_z": True, "z_channels": 32, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0, "batch_norm_latent": True,
}  # fmt: skip
ZIMAGE = {**comfy_networks.ZIMAGE, "in_channels": 16, "cap_feat_dim": small_models.QWEN["hidden_size"]}
HIDREAM = {
    **small_models.HIDREAM, "image_model": "hidream", "patch_size": 2, "in_channels": 16, "out_channels": 16,
    "text_emb_dim": 768 + 1280, "max_resolution": [128, 128],
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 128, "out_dim": 16, "num_heads": 1, "ffn_dim": 128,
    "num_layers": 2, "in_dim": 16,
}  # fmt: skip


def random(module: nn.Module) -> nn.Module:
    """Weights that keep the size of what goes through them; what ComfyUI makes is not even zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
            elif parameter.ndim == 1:
                parameter.fill_(float(name.endswith(("weight", "scale"))))  # of norms
    return module


def text_encoder(target: Any) -> nn.Module:
    clip = comfy.sd.CLIP(target, parameters=0, model_options=dict(small_models.TEXT_ENCODERS))
    return random(clip.cond_stage_model)


def vae(channels: int) -> dict[str, Tensor]:
    """Of the smallest VAE that ComfyUI has."""
    return random(comfy.taesd.taesd.TAESD(latent_channels=channels)).state_dict()


def checkpoint(
    path: Path, config: Any, clip: nn.Module, channels: int, network: dict[str, Tensor] | None, *keys: str
) -> None:
    """Network, text encoders and VAE in one file, as ComfyUI saves them; network: its weights, else random ones; keys:
    empty tensors beside them, which say something by their names."""
    model = config.get_model({})
    model.diffusion_model.load_state_dict(network) if network else random(model.diffusion_model)
    parts = {
        **config.process_unet_state_dict_for_saving(model.diffusion_model.state_dict()),
        **config.process_clip_state_dict_for_saving(clip.state_dict()),
        **config.process_vae_state_dict_for_saving(vae(channels)),
    }
    write(path, parts | {key: torch.zeros(0) for key in keys})


def write(path: Path, state: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: (t.half() if t.is_floating_point() else t).contiguous().clone() for key, t in state.items()}, path)


def native(network: nn.Module) -> dict[str, Tensor]:
    """A diffusers transformer's weights by ComfyUI's names."""
    return comfy.model_detection.convert_diffusers_mmdit(dict(random(network).state_dict()), "")


def newer(root: Path) -> None:
    """Chroma (whose text encoder and VAE are Flux's), Qwen-Image and, in a ComfyUI that knows them, Z-Image and FLUX.2
    klein (whose text encoder is Z-Image's)."""
    makers(root, "chroma", "Chroma1-HD", diffusers.ChromaTransformer2DModel(**CHROMA))
    makers(root, "qwenimage", "qwen_image_fp8_e4m3fn", diffusers.QwenImageTransformer2DModel(**QWENIMAGE))
    clip = text_encoder(supported.QwenImage({}).clip_target())
    write(root / "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors", clip.qwen25_7b.transformer.state_dict())
    films = comfy.ldm.wan.vae.WanVAE(z_dim=16, temperal_downsample=[False, True, True])
    write(root / "vae/qwen_image_vae.safetensors", random(films).state_dict())
    if hasattr(supported, "ZImage"):
        makers(root, "zimage", "z_image_bf16", diffusers.ZImageTransformer2DModel(**ZIMAGE))
        clip = text_encoder(supported.ZImage({}).clip_target())
        write(root / "text_encoders/qwen_3_4b.safetensors", clip.qwen3_4b.transformer.state_dict())
    if hasattr(supported, "Flux2"):
        makers(root, "flux2", "flux-2-klein-base-4b", diffusers.Flux2Transformer2DModel(**FLUX2))
        own = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=dict(VAE), embed_dim=VAE["z_channels"])
        write(root / "vae/flux2-vae.safetensors", random(own).state_dict())


def hidream(root: Path) -> None:
    """Two of its text encoders and the VAE are those of Flux, under other names."""
    write(root / "diffusion_models/hidream_i1_full_fp8.safetensors", own(supported.HiDream(dict(HIDREAM))))
    texts, options = root / "text_encoders", dict(small_models.TEXT_ENCODERS)
    (texts / "clip_l_hidream.safetensors").hardlink_to(texts / "clip_l.safetensors")
    (texts / "t5xxl_fp8_e4m3fn_scaled.safetensors").hardlink_to(texts / "t5xxl_fp16.safetensors")
    clip = random(comfy.sdxl_clip.SDXLClipG(model_options=options))
    write(texts / "clip_g_hidream.safetensors", clip.transformer.state_dict())
    llama = comfy.text_encoders.hunyuan_video.LLAMAModel(model_options={**options, "vocab_size": 128256})
    write(texts / "llama_3.1_8b_instruct_fp8_scaled.safetensors", random(llama).transformer.state_dict())


def wan(root: Path) -> None:
    """Its VAE is Qwen-Image's; the text encoder's file holds the tokenizer, too."""
    write(root / "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors", own(supported.WAN21_T2V(dict(WAN))))
    (root / "vae/wan_2.1_vae.safetensors").hardlink_to(root / "vae/qwen_image_vae.safetensors")
    options = {**small_models.TEXT_ENCODERS, "model_name": "umt5xxl"}
    model = random(comfy.text_encoders.wan.UMT5XXlModel(model_options=options))
    write(
        root / "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        {**model.transformer.state_dict(), "spiece_model": letters()},
    )


def letters() -> Tensor:
    """A tokenizer of single letters, with T5's marks, as its file."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog, in a cafe", "0123456789 - of."]),
        model_writer=written, model_type="char", vocab_size=100, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    return torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)


def own(config: Any) -> dict[str, Tensor]:
    """A random network of ComfyUI's own class, by its own names."""
    return random(config.get_model({}).diffusion_model).state_dict()


def makers(root: Path, family: str, name: str, network: nn.Module) -> None:
    """A diffusers transformer as the file that its makers publish."""
    state = makers_layout.named(family, dict(random(network).state_dict()))
    write(root / f"diffusion_models/{name}.safetensors", state)


def main() -> None:
    torch.set_num_threads(1)
    root = Path(os.environ["MODELS"])
    for name, config in (
        ("v1-5-pruned-emaonly-fp16", supported.SD15(dict(SD15))),
        ("sd_xl_base_1.0", supported.Segmind_Vega(dict(SDXL))),
    ):
        checkpoint(root / f"checkpoints/{name}.safetensors", config, text_encoder(config.clip_target()), 4, None)
    config = supported.Segmind_Vega(dict(SDXL))
    path, clip = root / "checkpoints/NoobAI-XL-Vpred-v1.0.safetensors", text_encoder(config.clip_target())
    checkpoint(path, config, clip, 4, None, "v_pred", "ztsnr")
    network = native(diffusers.SD3Transformer2DModel(**SD35))
    config = supported.SD3(comfy.model_detection.detect_unet_config(network, ""))
    norm = "transformer.text_model.final_layer_norm.weight"  # by which ComfyUI sees that an encoder is there
    target = config.clip_target({f"text_encoders.{name}.{norm}": None for name in ("clip_l", "clip_g")})
    name = "sd3.5_medium_incl_clips_t5xxlfp8scaled"
    checkpoint(root / f"checkpoints/{name}.safetensors", config, text_encoder(target), 16, network)
    write(root / "diffusion_models/flux1-dev.safetensors", native(diffusers.FluxTransformer2DModel(**FLUX)))
    clip = text_encoder(supported.Flux({}).clip_target())
    write(root / "text_encoders/clip_l.safetensors", clip.clip_l.transformer.state_dict())
    write(root / "text_encoders/t5xxl_fp16.safetensors", clip.t5xxl.transformer.state_dict())
    write(root / "vae/ae.safetensors", vae(16))
    newer(root)
    hidream(root)
    wan(root)
    print(json.dumps(sorted(str(path.relative_to(root)) for path in root.rglob("*.safetensors"))))


if __name__ == "__main__":
    main()
