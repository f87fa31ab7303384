"""Run by `test_native_edit.py` in ComfyUI's folder and interpreter: prints what a native policy does with sources.

The pictures that a prompt brings become reference latents, as ReferenceLatent makes them; what is drawn is compared
with KSampler's on the same conditionings.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any

from comfy_native_case import Case, randomise  # first: it finds ComfyUI
from comfy_native_models import SIDE, Clip

# isort: split
import node_helpers
import torch
from comfy_lora import difference
from torch import Tensor

import nodes
from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.source import Source
from dgpo_core.method.rollout import rollout
from dgpo_core.policy import Cond
from dgpo_core.settings.config import RolloutConfig

compare = importlib.import_module("pack.compare")
values = importlib.import_module("pack.common.values")
SIZE = (8 * SIDE, 8 * SIDE)
SEEDS = (5, 6)


def picture(seed: int) -> Tensor:
    return torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(seed))


PROMPTS = [Prompt(text, {}, "", (Source.of_pixels(picture(i)),)) for i, text in enumerate(("red", "blue"))]


def referring(case: Case, text: str, prompt: Prompt) -> Any:
    """As CLIP Text Encode, VAE Encode and ReferenceLatent make it."""
    (latent,) = nodes.VAEEncode().encode(case.vae, prompt.sources[0].image().movedim(0, -1)[None])
    values = {"reference_latents": [latent["samples"]]}
    return node_helpers.conditioning_set_values(case.clip.encode_from_tokens_scheduled(text), values, append=True)


def ksampler(case: Case, prompt: Prompt, seed: int, cfg: float) -> Tensor:
    with torch.inference_mode():
        (empty,) = nodes.EmptyLatentImage().generate(SIZE[1], SIZE[0])
        texts = [referring(case, text, prompt) for text in (prompt.text, "")]
        settings = (seed, 3, cfg, "euler", "normal", *texts, empty)
        return nodes.KSampler().sample(case.model, *settings, denoise=1.0)[0]["samples"]


def drawn(case: Case, policy: Any) -> dict[str, Any]:
    """The latents against KSampler's, without guidance and with it; and how much the source matters."""
    solver, found = policy.solver("euler", 3, *SIZE, scheduler="normal"), []
    for cfg in (1.0, 4.0):
        groups = rollout(policy, solver, PROMPTS, [SEEDS] * 2, size=SIZE, cfg=cfg)
        for group in groups:
            ours = case.native.model.process_latent_out(group.latents)
            theirs = torch.cat([ksampler(case, group.prompt, seed, cfg) for seed in SEEDS])
            found.append(bool(torch.equal(ours, theirs)))
    bare = rollout(policy, solver, [Prompt("red")], [SEEDS], size=SIZE)[0].latents
    (group,) = rollout(policy, solver, PROMPTS[:1], [SEEDS], size=SIZE)
    return {"same": found, "effect": difference(group.latents, bare)}


def trained(policy: Any) -> dict[str, float]:
    """Whether a prediction in training sees the source, and gradients come through."""
    randomise(policy)
    x, t = torch.randn(2, *policy.latent_shape(*SIZE)), torch.tensor([700.0, 300.0])
    conds, uncond = policy.condition(PROMPTS, "", SIZE)
    found = policy.predict(x, t, Cond.cat(conds))
    found.square().sum().backward()
    grads = [p.grad for p in policy.trainable().values() if p.grad is not None]
    with torch.no_grad():
        swapped = policy.predict(x, t, Cond.cat([*policy.condition([PROMPTS[0]], "", SIZE)[0], conds[0]]))
        bare = policy.predict(x, t, Cond.cat(policy.encode(["red", "blue"])))
    return {
        "rows": len(uncond),
        "finite": all(bool(grad.isfinite().all()) for grad in grads),
        "largest": max(float(grad.abs().max()) for grad in grads),
        "same": difference(swapped[:1], found[:1].detach()),
        "effect": difference(bare, found.detach()),
    }


def counted(policy: Any) -> list[int]:
    """Bytes of activations of a forward for a prompt without a source, and for one with."""
    asked = (Prompt("red"), PROMPTS[0])
    return [policy.counts.of_prompt(prompt, *SIZE, recompute=False).forward.peak["activations"] for prompt in asked]


def compared(case: Case) -> list[bool] | str:
    """Whether Before / After draws what KSampler does, with two MODELs and prompts with sources; or what it says."""
    models = {"model_after": case.model, "clip": case.clip, "vae": case.vae, "sampler": "euler", "scheduler": "normal"}
    settings = values.Sampler(RolloutConfig(steps=3, cfg=4.0), *SIZE)
    with torch.inference_mode():
        try:
            groups = compare._native(models, "model_after", PROMPTS, SEEDS, settings)
        except UserError as error:
            return str(error)
        drawn = [[case.vae.decode(ksampler(case, prompt, seed, 4.0)) for seed in SEEDS] for prompt in PROMPTS]
    return [
        torch.equal(group.images, torch.cat(pictures).reshape(-1, *SIZE, 3).movedim(-1, 1))
        for group, pictures in zip(groups, drawn, strict=True)
    ]


class SeeingClip(Clip):
    """One whose tokenizer takes pictures, as Qwen-Image's does; it keeps the shapes of those that it was shown."""

    shown: tuple[tuple[int, ...], ...] = ()

    def tokenize(self, text: str, images: Sequence[Tensor] = ()) -> str:
        self.shown = (*self.shown, *(tuple(image.shape) for image in images))
        return text


def seen() -> dict[str, Any]:
    """What a text encoder that sees is shown of a prompt with a source, and of one without."""
    case = Case("qwen")
    case.clip = SeeingClip("qwen")
    case.policy().condition([Prompt("green", {}, "", (Source.of_pixels(torch.rand(3, 64, 128)),))], "", (64, 128))
    case.policy().condition([Prompt("green")], "", (64, 128))
    return {"shapes": case.clip.shown}


def main() -> None:
    cases = {}
    for family in ("flux", "qwen"):
        case = Case(family)
        policy = case.policy()
        cases[family] = {
            "compared": compared(case),
            "counted": counted(policy),
            "drawn": drawn(case, policy),
            "sources": policy.sources,
            "trained": trained(policy),
        }
    plain = Case("sd15")
    sd15 = {"compared": compared(plain), "sources": plain.policy().sources}
    print(json.dumps({**cases, "seen": seen(), "sd15": sd15}))


main()
