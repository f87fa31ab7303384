"""What a file is, from its header alone: families, every other kind by its name, and files that are no model at all."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from checkpoints import CASES
from safetensors.torch import save_file

from dgpo_core.common.errors import UserError
from dgpo_core.policy import FAMILIES, load_policy
from dgpo_core.policy.families.flux import Flux
from dgpo_core.policy.loading.header import read_header
from dgpo_core.policy.loading.recognise import family_class, recognise

UNREADABLE_GGUF = "is a GGUF file" + (
    " that cannot be read" if importlib.util.find_spec("gguf") else ", which needs the package gguf"
)
UNET = "model.diffusion_model.input_blocks.0.0.weight"
FLUX = "double_blocks.0.img_attn.norm.key_norm.scale"
SD3 = "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"
KINDS: dict[str, tuple[list[str], str]] = {
    "lora of kohya": (["lora_unet_down_blocks_0.lora_down.weight"], "a LoRA"),
    "lora of diffusers": (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA"),
    "lokr": (["lora_unet_x.lokr_w1"], "a LoRA"),
    "embedding": (["emb_params"], "a textual inversion"),
    "embedding of sdxl": (["clip_g", "clip_l"], "a textual inversion"),
    "controlnet": (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
    "ip-adapter": (["image_proj.proj.weight"], "an IP-Adapter"),
    "bitsandbytes": ([FLUX, "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4"], "bitsandbytes"),
    "svdquant": (["transformer_blocks.0.qkv_proj.qweight"], "SVDQuant"),
    "nvfp4": ([FLUX, "double_blocks.0.img_attn.qkv.weight_scale_2"], "nvfp4"),
    "playground": ([UNET, "model.diffusion_model.label_emb.0.0.weight", "edm_mean", "edm_std"], "Playground 2.5"),
    "cosxl": ([UNET, "model.diffusion_model.label_emb.0.0.weight", "edm_vpred.sigma_max"], "CosXL"),
    "refiner": (
        ["model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.0.model.token_embedding.weight"],
        "an SDXL refiner",
    ),
    "svd": (["model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.weight", UNET], "Stable Video Diffusion"),
    "unclip": ([UNET, "noise_augmentor.data_mean"], "an unCLIP model"),
    "chroma radiance": (["distilled_guidance_layer.norms.0.scale", "nerf_blocks.0.norm.scale"], "Chroma Radiance"),
    "hunyuan": (["txt_in.individual_token_refiner.blocks.0.norm1.weight"], "HunyuanVideo"),
    "hunyuan dit": (["mlp_t5.0.weight"], "HunyuanDiT"),
    "pixart": (["t_block.1.weight"], "PixArt"),
    "z-image omni": (["cap_embedder.0.weight", "x_pad_token", "siglip_embedder.0.weight"], "Z-Image Omni"),
    "z-image in pixels": (["cap_embedder.0.weight", "x_pad_token", "dec_net.cond_embed.weight"], "pixel space"),
    "z-image controlnet": (["control_layers.0.attention.qkv.weight"], "a ControlNet"),
    "lumina": (["cap_embedder.0.weight"], "Lumina 2"),
    "qwen edit": (["transformer_blocks.0.img_mod.1.weight", "__index_timestep_zero__"], "Qwen-Image-Edit"),
    "qwen layered": (
        ["transformer_blocks.0.img_mod.1.weight", "time_text_embed.addition_t_embedding.weight"],
        "Qwen-Image-Layered",
    ),
    "qwen 2.1": (["txt_in.text_norm.weight"], "Qwen-Image 2.1"),
    "mage": (["txt_norm.weight"], "Mage or Lens"),
    "wan of pictures": (["head.modulation", "img_emb.proj.0.bias"], "a Wan that is shown .*: take Wan 2.1 T2V or"),
    "wan vace": (["head.modulation", "vace_blocks.0.modulation"], "a Wan that is shown"),
    "wan scail": (["head.modulation", "patch_embedding_pose.weight"], "a Wan that is shown"),
    "auraflow": (["double_layers.0.attn.w1q.weight"], "AuraFlow"),
    "cascade": (["clip_txt_mapper.weight"], "Stable Cascade"),
    "sana": (  # which has the names of PixArt, too
        ["t_block.1.weight", "blocks.0.cross_attn.q_linear.weight", "blocks.0.mlp.inverted_conv.conv.weight"],
        "is Sana as a single file.*: take its diffusers folder",
    ),
    "kolors": (["encoder_hid_proj.weight", UNET], "Kolors"),
    "diffusers network": (["down_blocks.0.resnets.0.conv1.weight"], "the network alone"),
    "text encoder": (["text_model.encoder.layers.0.mlp.fc1.weight"], "a text encoder alone"),
    "t5": (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a text encoder alone"),
    "vae": (["decoder.conv_in.weight", "encoder.conv_in.weight"], "a VAE alone"),
    "unknown": (["something.weight"], "not a checkpoint of any of the families"),
}


@pytest.mark.parametrize(("keys", "name"), KINDS.values(), ids=KINDS)
def test_a_kind_that_cannot_be_trained_is_refused_by_its_name(keys: list[str], name: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(4, 4) for key in keys}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=name) as caught:
        load_policy(tmp_path / "model.safetensors", rank=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "channels", "name"),
    [
        (UNET, 9, "an inpainting model"),
        (UNET, 8, "InstructPix2Pix"),
        (UNET, 5, "depth"),
        (UNET, 7, "an upscaling model"),
        ("img_in.weight", 384, "Flux Fill"),
        ("img_in.weight", 128, "Flux Depth or Canny"),
        ("patch_embedding.weight", 36, "a Wan that is shown"),
    ],
)
def test_a_network_that_wants_more_than_a_latent_is_refused(key: str, channels: int, name: str, tmp_path: Path) -> None:
    marks = {"img_in.weight": {FLUX: torch.zeros(4)}, "patch_embedding.weight": {"head.modulation": torch.zeros(4)}}
    save_file({key: torch.zeros(4, channels)} | marks.get(key, {}), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=name):
        recognise(read_header(tmp_path / "model.safetensors"))


def test_the_inpainting_case_is_refused_before_anything_is_drawn() -> None:
    with pytest.raises(UserError, match="is an inpainting model"):
        load_policy(CASES / "sd15_inp2.safetensors", rank=2)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("stable-diffusion-xl-v1-refiner", "refiner"),
        ("stable-diffusion-v1-inpainting", "inpainting"),
        ("stable-diffusion-xl-v1-base/lora", "a LoRA"),
    ],
)
def test_what_the_header_calls_it_counts(architecture: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({UNET: torch.zeros(4, 4)}, path, metadata={"modelspec.architecture": architecture})
    with pytest.raises(UserError, match=name):
        recognise(read_header(path))


@pytest.mark.parametrize(
    ("name", "architecture"), [("flux1-dev-kontext_fp8.safetensors", ""), ("x.safetensors", "flux-1-kontext-dev")]
)
def test_kontext_has_the_tensors_of_flux_and_is_known_by_its_name_or_header(
    name: str, architecture: str, tmp_path: Path
) -> None:
    metadata = {"modelspec.architecture": architecture}
    save_file({FLUX: torch.zeros(4, 4)}, tmp_path / name, metadata=metadata)
    assert recognise(read_header(tmp_path / name)) == "kontext"
    save_file({FLUX: torch.zeros(4, 4)}, tmp_path / "flux1-dev.safetensors")
    assert recognise(read_header(tmp_path / "flux1-dev.safetensors")) == "flux"
    assert family_class("flux", "kontext", "It") is FAMILIES["kontext"]


def test_qwen_image_edit_has_the_tensors_of_qwen_image_and_is_known_by_its_name(tmp_path: Path) -> None:
    (mark,) = FAMILIES["qwenimage"].marks
    for name, family in (("qwen_image_edit_2509_bf16", "qwen-image-edit"), ("qwen_image_bf16", "qwenimage")):
        save_file({mark: torch.zeros(4, 4)}, tmp_path / f"{name}.safetensors")
        assert recognise(read_header(tmp_path / f"{name}.safetensors")) == family


@pytest.mark.parametrize(
    "name", ["wan2.2_t2v_high_noise_14B_fp8_scaled", "Wan2.2-T2V-A14B-LowNoise-Q8", "wan2.2_t2v_low_noise_14B_fp16"]
)
def test_half_of_wan22_a14b_has_the_tensors_of_wan21_and_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    (mark,) = FAMILIES["wan"].marks
    save_file({mark: torch.zeros(4, 4)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"of Wan 2.2 A14B, whose two networks .*: take Wan 2.1 T2V or Wan 2.2 TI2V-5B"):
        recognise(read_header(tmp_path / f"{name}.safetensors"))
    for other in ("wan2.1_t2v_14B_fp8_scaled", "wan2.2_ti2v_5B_fp16"):
        save_file({mark: torch.zeros(4, 4)}, tmp_path / f"{other}.safetensors")
        assert recognise(read_header(tmp_path / f"{other}.safetensors")) == "wan"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_known_by_each_of_its_marks(family: str, tmp_path: Path) -> None:
    for mark in FAMILIES[family].marks:
        for prefix in ("", "model.diffusion_model."):
            save_file({prefix + mark: torch.zeros(4, 4)}, tmp_path / "model.safetensors")
            assert recognise(read_header(tmp_path / "model.safetensors")) == family


def test_a_kind_that_a_new_family_is_known_as_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = "double_layers.0.attn.w1q.weight"
    path = tmp_path / "model.safetensors"
    save_file({mark: torch.zeros(4)}, path)
    with pytest.raises(UserError, match="is AuraFlow"):
        recognise(read_header(path))
    monkeypatch.setitem(FAMILIES, "auraflow", type("AuraFlow", (Flux,), {"marks": (mark,), "known_as": ("AuraFlow",)}))
    assert recognise(read_header(path)) == "auraflow"


# --- files that are no model -----------------------------------------------------------------------------------------


def header(content: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {UNET: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.safetensors", b"", "ends within its header"),
    "cut in the header": ("a.safetensors", header(tensor())[:20], "ends within its header"),
    "cut in the data": ("a.safetensors", header(tensor(), b"00"), "ends too early"),
    "header of 10^18": ("a.safetensors", header({}, length=10**18), "ends within its header"),
    "header that is no JSON": ("a.safetensors", header(b"{no"), "not valid JSON"),
    "header that is a list": ("a.safetensors", header([]), "no table of tensors"),
    "nested without end": ("a.safetensors", header(b"[" * 10**5), "nested too deeply"),
    "unknown number type": ("a.safetensors", header(tensor("F99"), b"0000"), "unknown number type F99"),
    "number type that is a list": ("a.safetensors", header(tensor([])), "does not describe"),
    "negative shape": ("a.safetensors", header(tensor(shape=[-1])), "does not describe"),
    "shape of 10^18": ("a.safetensors", header(tensor(shape=[10**18])), "as many bytes as its shape"),
    "text for offsets": ("a.safetensors", header(tensor(offsets="04")), "does not describe"),
    "metadata that is a list": ("a.safetensors", header({"__metadata__": [1]}), "metadata is no table"),
    "no tensors": ("a.safetensors", header({}), "not a checkpoint of any"),
    "pickle under the name": ("a.safetensors", b"\x80\x04K\x01." * 20, "is a pickle"),
    "zip under the name": ("a.safetensors", b"PK\x03\x04" * 20, "is a pickle"),
    "web page": ("a.safetensors", b"<!DOCTYPE html><html></html>" * 9, "is a web page"),
    "LFS pointer": ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "gguf": ("a.gguf", b"GGUF" + bytes(99), UNREADABLE_GGUF),
    "gguf under the name": ("a.safetensors", b"GGUF" + bytes(99), "under a name that ends in .gguf"),
    "gguf by name": ("a.gguf", bytes(99), UNREADABLE_GGUF),
    "ckpt": ("a.ckpt", bytes(99), "only those are loaded"),
    "bin": ("a.bin", bytes(99), "only those are loaded"),
    "shard": ("model-00001-of-00002.safetensors", header(tensor(), b"0000"), "one part of several"),
}


@pytest.mark.parametrize(("name", "content", "says"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_model_is_called_what_it_is(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_policy(tmp_path / name, rank=2)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_header_whose_length_looks_like_another_files_beginning_is_read(tmp_path: Path) -> None:
    content = header(tensor(), b"0000")
    for first in b"<\x80":  # the lowest byte of a length
        padded = content[8:-4] + b" " * (first + 256 - len(content[8:-4]))
        (tmp_path / "a.safetensors").write_bytes(header(padded, b"0000"))
        assert list(read_header(tmp_path / "a.safetensors").tensors) == [UNET]
