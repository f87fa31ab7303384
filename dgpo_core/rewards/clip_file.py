"""A CLIPModel of transformers in one .safetensors file: what the network is, by the shapes of its tensors."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import CLIPConfig, CLIPModel

from dgpo_core.common.errors import UserError
from dgpo_core.rewards.weight_files import load_tensors

HEAD = 64  # numbers per attention head, which the tensors do not say
WIDER_HEADS = {1280: 80, 1408: 88, 1664: 104}  # in the image encoders ViT-H, ViT-g and ViT-bigG, by their width
KIND = "a CLIP model as transformers saves it"

Shapes = Mapping[str, Sequence[int]]


def check(file: Path) -> None:
    """Raises UserError where the file is not a whole CLIPModel. Its head is read, no tensor."""
    try:
        about = file.stat()
        fault = _fault(file, about.st_mtime_ns, about.st_size)
    except OSError as error:
        fault = error.strerror or type(error).__name__
    if fault:
        raise UserError(f"{file} is not {KIND} ({fault}): choose another file, or download it again.")


def load(file: Path, activation: str) -> CLIPModel:
    """The model, on the CPU, for evaluation and without gradients, in the file's own number type.

    activation: transformers' name of the one in the feed-forward layers ("gelu", "quick_gelu"); no tensor says it.
    Raises UserError as `check`.
    """
    check(file)
    state = load_tensors(file)
    config = architecture({name: tensor.shape for name, tensor in state.items()}, activation)
    model: CLIPModel = CLIPModel.from_pretrained(None, config=config, state_dict=state)
    return model.eval().requires_grad_(False)


def architecture(shapes: Shapes, activation: str = "gelu") -> CLIPConfig:
    """What a CLIPModel with tensors of these shapes is. Raises KeyError, ValueError or ZeroDivisionError for others."""
    words, text_width = shapes["text_model.embeddings.token_embedding.weight"]
    width, _, _, patch = shapes["vision_model.embeddings.patch_embedding.weight"]
    cells = shapes["vision_model.embeddings.position_embedding.weight"][0] - 1
    end = words - 1  # the last of CLIP's words ends a text, the one before begins it
    text = {
        **_layers(shapes, "text_model", text_width, HEAD),
        "vocab_size": words,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": activation,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = {
        **_layers(shapes, "vision_model", width, WIDER_HEADS.get(width, HEAD)),
        "image_size": patch * math.isqrt(cells),
        "patch_size": patch,
        "hidden_act": activation,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=shapes["visual_projection.weight"][0])


def _layers(shapes: Shapes, part: str, width: int, head: int) -> dict[str, int]:
    if width % head:
        raise ValueError(f"a width of {width} is not one of CLIP's")
    pattern = re.compile(rf"{part}\.encoder\.layers\.(\d+)\.")
    return {
        "hidden_size": width,
        "intermediate_size": shapes[f"{part}.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len({found[1] for name in shapes if (found := pattern.match(name))}),
        "num_attention_heads": width // head,
    }


@functools.lru_cache(maxsize=16)
def _fault(file: Path, changed: int, size: int) -> str:
    """What is wrong with a file as it was left at that time; empty for nothing."""
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        return str(error)
    try:
        with torch.device("meta"):
            wanted = CLIPModel(architecture(shapes)).named_parameters()
    except KeyError as error:
        return f"it has no {error.args[0]}"
    except (ValueError, RuntimeError) as error:
        return str(error).split("\n")[0]
    wrong = [name for name, tensor in wanted if list(shapes.get(name, ())) != list(tensor.shape)]
    return f"its {wrong[0]} is missing or of another size" if wrong else ""
