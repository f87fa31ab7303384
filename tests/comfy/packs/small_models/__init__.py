"""A custom node pack for tests: ComfyUI loads models of the published forms that are much smaller than the published.

What it otherwise takes as given is made small: the layers of the text encoders, and the width of Flux.
"""

from __future__ import annotations

import functools
from typing import Any

import comfy.model_detection
import comfy.sd1_clip

TEXT_ENCODERS = {
    "clip_l_model_config": {"num_hidden_layers": 3, "intermediate_size": 64},
    "clip_g_model_config": {"num_hidden_layers": 3, "intermediate_size": 64},
    "t5xxl_model_config": {"num_layers": 1, "num_heads": 4, "d_ff": 64},
}
_text_encoder = comfy.sd1_clip.SDClipModel.__init__
_detect = comfy.model_detection.detect_unet_config


@functools.wraps(_text_encoder)
def small_text_encoder(self: Any, *args: Any, model_options: Any = None, **kwargs: Any) -> None:
    _text_encoder(self, *args, model_options={**(model_options or {}), **TEXT_ENCODERS}, **kwargs)


@functools.wraps(_detect)
def detect_width(state: Any, prefix: str, *args: Any, **kwargs: Any) -> Any:
    found = _detect(state, prefix, *args, **kwargs)
    if found and found.get("image_model") == "flux":
        width = state[f"{prefix}img_in.weight"].shape[0]
        found.update(hidden_size=width, num_heads=width // 128)
    return found


comfy.sd1_clip.SDClipModel.__init__ = small_text_encoder
comfy.model_detection.detect_unet_config = detect_width
NODE_CLASS_MAPPINGS: dict[str, Any] = {}
