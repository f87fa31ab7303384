"""Writes the network of a small SD1.5 as a GGUF file, and the folder with its other parts beside it."""

from __future__ import annotations

from pathlib import Path

import gguf
import single_file
import tiny
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file


def pipeline(folder: Path) -> StableDiffusionPipeline:
    """SD1.5 of the tiny one's parts, but with rows of whole blocks of 32."""
    pipe = tiny.sd15(folder)
    torch.manual_seed(1)
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "block_out_channels": (32, 64)})
    return pipe


def write(folder: Path, kind: str) -> Path:
    """The file: its Linears in blocks are of `kind`, a name of GGUF's, convolutions float16 and all else float32.

    The folder of its name beside it is the whole model.
    """
    pipe = pipeline(folder)
    pipe.save_pretrained(folder / "model")
    state = load_file(single_file.write(pipe, folder / "whole.safetensors"))
    (folder / "whole.safetensors").unlink()
    quant = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[quant]
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "sd1")
    for name, tensor in state.items():
        if not name.startswith("model.diffusion_model."):
            continue
        if tensor.ndim == 2 and tensor.shape[1] % block == 0 and "transformer_blocks" in name:
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, tensor.half().numpy() if tensor.ndim == 4 else tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"
