"""What the families with a UNet share: SD 1.x and 2.x, and SDXL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from dgpo_core.diffusion.prediction import Prediction, prediction_from_config
from dgpo_core.policy.lora.names import Place
from dgpo_core.policy.pipeline import DiffusersPolicy

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


class UNetPolicy(DiffusersPolicy):
    """A UNet on a table of betas; the prediction is what the scheduler's config says."""

    network_name = "unet"
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    kept_whole = ("time_emb_proj",)
    kinds = ("epsilon", "v", "flow")
    betas = {  # noqa: RUF012 - as in the base class
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
    input_layer = "input_blocks.0.0.weight"
    other_inputs = {  # noqa: RUF012 - as in the base class
        5: "a model of pictures with depth",
        7: "an upscaling model",
        8: "an InstructPix2Pix model, which edits pictures",
        9: "an inpainting model",
    }

    @classmethod
    def makers_names(cls, network: Any, own: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
        blocks = dict(_UNET)
        for way, first, block in (("down", 1, "input_blocks"), ("up", 0, "output_blocks")):
            blocks |= _numbered(getattr(network, f"{way}_blocks"), way, first, block)
        for name in own:
            start = next((b for b in blocks if name == b or name.startswith(f"{b}.")), None)
            if start is not None:
                rest = name.removeprefix(start).removeprefix(".")
                yield ".".join(filter(None, (blocks[start], _RESNET.get(rest, rest)))), Place((name,))

    def _prediction(self) -> Prediction:
        return prediction_from_config(self.scheduler_config, self.device)


def _numbered(stages: Any, way: str, first: int, block: str) -> dict[str, str]:
    """The blocks of one way through the UNet, which its makers number on; a change of size counts as one going down."""
    blocks: dict[str, str] = {}
    number = first
    for i, stage in enumerate(stages):
        inner = ["resnets", "attentions"] if getattr(stage, "attentions", None) else ["resnets"]
        for j in range(len(stage.resnets)):
            blocks |= {f"{way}_blocks.{i}.{kind}.{j}": f"{block}.{number}.{k}" for k, kind in enumerate(inner)}
            number += 1
        if way == "down" and stage.downsamplers:
            blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"{block}.{number}.0.op"
            number += 1
        if way == "up" and stage.upsamplers:
            blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"{block}.{number - 1}.{len(inner)}.conv"
    return blocks
