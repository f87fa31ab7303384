"""The modules of a diffusers network under the names that other trainers give them.

kohya's scripts, ComfyUI's trainer and others name a module as the checkpoint of its makers does, where q, k and v are
one weight. diffusers' own converters know the published size of Flux alone and nothing of SD3; here the names are read
off the network itself, so that they hold for every size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown
from dgpo_core.policy.lora import keys as lora_keys
from dgpo_core.policy.lora.file import LoraFile


@dataclass(frozen=True)
class Place:
    """Where a weight of another naming lies: in the rows of these modules, one after the other.

    swapped: its two halves are the other way round (the shift and scale of a last norm).
    """

    modules: tuple[str, ...]
    swapped: bool = False


def resolve(lora: LoraFile, network: nn.Module) -> LoraFile:
    """The LoRA under the names of the network's own modules, fused ones taken apart.

    Raises UserError where it is for another model, as a whole or in part.
    """
    places = _places(network)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    strange = [name for name in lora.weights if _flat(lora_keys.bare(name)) not in places]
    if len(strange) == len(lora.weights):
        raise UserError(f"The LoRA {shown(lora.path)} is for another model: no layer of this one has the names in it.")
    if strange:
        raise UserError(
            f"The LoRA {shown(lora.path)} changes {shown(strange[0])}, which this model lacks: give one of this model."
        )
    for name, pair in lora.weights.items():
        for module, part in _taken_apart(lora, name, pair, places[_flat(lora_keys.bare(name))], network):
            if module in found:
                raise UserError(
                    f"The LoRA {shown(lora.path)} changes {module} twice, under two names: give one with one of them."
                )
            found[module] = part
    return replace(lora, weights=found)


def _taken_apart(
    lora: LoraFile, name: str, pair: tuple[Tensor, Tensor], place: Place, network: nn.Module
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Each module with its A and its rows of B."""
    a, b = pair
    if len(place.modules) == 1:
        yield place.modules[0], (a, torch.cat(b.chunk(2)[::-1]) if place.swapped else b)
        return
    rows = [_rows(network.get_submodule(module)) for module in place.modules]
    if sum(rows) != b.shape[0]:
        raise UserError(
            f"The LoRA {shown(lora.path)} does not fit: {shown(name)} has {sum(rows)} rows in the model and"
            f" {b.shape[0]} in the file."
        )
    yield from ((module, (a, part)) for module, part in zip(place.modules, b.split(rows), strict=True))


def _rows(module: nn.Module) -> int:
    layer: Any = module  # a Linear or a convolution
    return layer.out_features if hasattr(layer, "out_features") else layer.out_channels


def _flat(name: str) -> str:
    """kohya's way to write it."""
    return name.replace(".", "_")


def _places(network: nn.Module) -> Mapping[str, Place]:
    """From every known name of a module, flat, to where it is: its own name before all."""
    own = {
        name: module
        for name, module in network.named_modules()
        if hasattr(module, "weight") and (hasattr(module, "out_features") or hasattr(module, "out_channels"))
        and not name.endswith(".base_layer")  # of a module that has an adapter
        and ".lora_" not in name
    }  # fmt: skip
    found = {_flat(name): Place((name,)) for name in own}
    # diffusers' first files called it without the number
    found |= {_flat(name.removesuffix(".0")): Place((name,)) for name in own if name.endswith(".to_out.0")}
    makers = _MAKERS.get(type(network).__name__)
    for name, place in makers(network, own) if makers else ():
        if all(module in own for module in place.modules):
            found.setdefault(_flat(name), place)
    return found


# --- UNets: the names of the first Stable Diffusion and of SDXL ------------------------------------------------------

_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_RESNET = {
    "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip


def _unet(network: Any, own: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
    blocks = dict(_UNET)
    for way, first, block in (("down", 1, "input_blocks"), ("up", 0, "output_blocks")):
        blocks |= _numbered(getattr(network, f"{way}_blocks"), way, first, block)
    for name in own:
        start = next((b for b in blocks if name == b or name.startswith(f"{b}.")), None)
        if start is not None:
            rest = name.removeprefix(start).removeprefix(".")
            yield ".".join(filter(None, (blocks[start], _RESNET.get(rest, rest)))), Place((name,))


def _numbered(stages: Any, way: str, first: int, block: str) -> dict[str, str]:
    """The blocks of one way through the UNet, which its makers number on; a change of size counts as one going down."""
    found: dict[str, str] = {}
    number = first
    for i, stage in enumerate(stages):
        inner = ["resnets", "attentions"] if getattr(stage, "attentions", None) else ["resnets"]
        for j in range(len(stage.resnets)):
            found |= {f"{way}_blocks.{i}.{kind}.{j}": f"{block}.{number}.{k}" for k, kind in enumerate(inner)}
            number += 1
        if way == "down" and stage.downsamplers:
            found[f"down_blocks.{i}.downsamplers.0.conv"] = f"{block}.{number}.0.op"
            number += 1
        if way == "up" and stage.upsamplers:
            found[f"up_blocks.{i}.upsamplers.0.conv"] = f"{block}.{number - 1}.{len(inner)}.conv"
    return found


# --- transformers ----------------------------------------------------------------------------------------------------

_SD3_BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn.proj": ("attn.to_out.0",), "x_block.attn2.proj": ("attn2.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.mlp.fc1": ("ff.net.0.proj",), "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",), "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",), "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}  # fmt: skip
_SD3 = {
    "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder", "final_layer.linear": "proj_out",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
}  # fmt: skip


def _sd3(network: Any, own: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
    last = len(network.transformer_blocks) - 1
    for i in range(last + 1):
        for name, modules in _SD3_BLOCK.items():
            swapped = i == last and name == "context_block.adaLN_modulation.1"  # its text stream ends there
            yield f"joint_blocks.{i}.{name}", Place(tuple(f"transformer_blocks.{i}.{m}" for m in modules), swapped)
    yield from ((name, Place((module,))) for name, module in _SD3.items())
    yield "final_layer.adaLN_modulation.1", Place(("norm_out.linear",), swapped=True)


_FLUX_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",), "img_mod.lin": ("norm1.linear",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}  # fmt: skip
_FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear1_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}  # fmt: skip
_FLUX = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}  # fmt: skip


def _flux(network: Any, own: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
    for theirs, ours, block in (
        ("double_blocks", "transformer_blocks", _FLUX_DOUBLE),
        ("single_blocks", "single_transformer_blocks", _FLUX_SINGLE),
    ):
        for i in range(len(getattr(network, ours))):
            for name, modules in block.items():
                yield f"{theirs}.{i}.{name}", Place(tuple(f"{ours}.{i}.{module}" for module in modules))
    yield from ((name, Place((module,))) for name, module in _FLUX.items())
    yield "final_layer.adaLN_modulation.1", Place(("norm_out.linear",), swapped=True)


_MAKERS = {"UNet2DConditionModel": _unet, "SD3Transformer2DModel": _sd3, "FluxTransformer2DModel": _flux}
