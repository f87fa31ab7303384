"""Run by `test_native_wan22.py` in ComfyUI's folder and interpreter: prints what a native policy does with Wan 2.2 5B.

Its latents have 48 channels and a sixteenth of the pictures' sides; network and VAE are small and random.
"""

from __future__ import annotations

import json
from typing import Any

import comfy_native_case
from comfy_native_case import Case, randomise, worst  # first: it finds ComfyUI
from comfy_native_models import CHANNELS, NATIVES, SIDE, WAN, Plan, fill

# isort: split
import comfy.ldm.wan.vae2_2
import comfy.sd
import comfy.supported_models as supported
import torch
from comfy_lora import difference

from dgpo_core.common.prompts import Prompt
from dgpo_core.method.rollout import rollout

NAME, LATENTS = "wan22", 48
SIZE = (16 * SIDE, 16 * SIDE)


class Narrow(comfy.ldm.wan.vae2_2.WanVAE):
    """ComfyUI takes its widths for granted."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "dim": 8, "dec_dim": 8})


def vae(_: str) -> Any:
    """ComfyUI's own, of a twentieth of the width."""
    comfy.ldm.wan.vae2_2.WanVAE = Narrow
    parts = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "z_dim": LATENTS}
    whole = Narrow(**parts, temperal_downsample=[False, True, True], dropout=0.0)
    fill(whole, torch.Generator().manual_seed(4))
    return comfy.sd.VAE(sd=whole.state_dict())


def main() -> None:
    channels = {"in_dim": LATENTS, "out_dim": LATENTS}
    NATIVES[NAME] = Plan(lambda: supported.WAN22_T2V({**WAN, **channels}), steps=1).random
    CHANNELS[NAME], comfy_native_case.vae = LATENTS, vae
    case = Case(NAME)
    case.shape = (LATENTS, 1, SIDE, SIDE)
    policy = case.policy()
    solver = policy.solver("euler", 3, *SIZE, scheduler="normal")
    with policy.using(None):
        (group,) = rollout(policy, solver, [Prompt("red")], [(5,)], size=SIZE, cfg=4.0)
    drawn = case.native.model.process_latent_out(group.latents)
    policy.to("cpu")
    found = {"same": torch.equal(drawn, case.drawn()), "pictures": list(group.images.shape)}
    randomise(policy)
    expected, grads = case.plain_gradients(policy)
    predicted, ours, saved = case.gradients(policy)
    found |= {"prediction": difference(predicted, expected), "gradient": worst(ours, grads), "saved": saved}
    print(json.dumps({**found, "reached": len(ours)}))


main()
