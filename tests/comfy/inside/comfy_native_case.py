"""A small MODEL of ComfyUI's, a native policy on it, and plain autograd on a second copy of the same weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from comfy_native_models import CHANNELS, NATIVES, SIDE, VIDEO, Clip, vae  # first: it finds ComfyUI

# isort: split
import comfy.sample
import torch
from torch import Tensor

native_policy = importlib.import_module("pack.on_model.policy")
native_texts = importlib.import_module("pack.on_model.texts")


class Case:
    """A family's MODEL, CLIP and VAE as loader nodes give them, and a policy on them."""

    def __init__(self, family: str) -> None:
        self.family, self.clip = family, Clip(family)
        with torch.inference_mode():
            self.native, self.vae = NATIVES[family](), vae(family)
        self.model = self.native.patcher()
        self.plain = NATIVES[family]()
        self.plain.model.requires_grad_(False)
        self.shape = (CHANNELS.get(family, 4), *((1,) if family in VIDEO else ()), SIDE, SIDE)

    def policy(self, model: Any = None, **settings: Any) -> Any:
        given = {"rank": 4, "alpha": 8.0, "targets": (), "seed": 0, **settings}
        encode = native_texts.by_clip(self.clip).encode
        return native_policy.NativePolicy(model or self.model, encode, self.vae, **given)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t and the loss's weights for three rows."""
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(3, *self.shape, generator=generator)
        return x, torch.tensor([700.0, 300.0, 300.0]), torch.randn(x.shape, generator=generator)

    def reference(self, adapter: dict[str, Tensor] | None = None, scale: float = 2.0) -> Tensor:
        """What plain autograd makes of the second copy, with `adapter` beside its Linears, for one text."""
        x, t, _ = self.inputs()
        cond = self.clip.tensors("red").expand(3).tensors
        handles = []
        for name, module in self.plain.model.diffusion_model.named_modules():
            if adapter and f"{name}.lora_A.weight" in adapter:
                pair = adapter[f"{name}.lora_A.weight"], adapter[f"{name}.lora_B.weight"]
                handles.append(module.register_forward_hook(branch(*pair, scale)))
        try:
            return self.plain.call(self.plain.model.diffusion_model, x, t, cond)
        finally:
            for handle in handles:
                handle.remove()

    def drawn(self, model: Any = None) -> Tensor:
        """What KSampler draws, in inference mode as ComfyUI runs it."""
        with torch.inference_mode():
            latent = torch.zeros(1, *self.shape)
            texts = [self.clip.encode_from_tokens_scheduled(text) for text in ("red", "")]
            noise = comfy.sample.prepare_noise(latent, 5)
            return comfy.sample.sample(
                model or self.model, noise, 3, 4.0, "euler", "normal", *texts, latent, disable_pbar=True, seed=5
            )

    def gradients(self, policy: Any, text: str = "red") -> tuple[Tensor, dict[str, Tensor], int]:
        """The policy's prediction, its adapter's gradients, and how many of the base's weights autograd had saved."""
        x, t, weights = self.inputs()
        kinds = ("Linear", "Conv1d", "Conv2d", "Conv3d")  # parameters of others are replaced while it trains
        layers = [m for m in self.native.model.modules() if type(m).__name__ in kinds]
        base = {getattr(p, "_qdata", p).data_ptr() for layer in layers for p in layer.parameters(recurse=False)}
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda v: saved.append(getattr(v, "_qdata", v).data_ptr()) or v, lambda v: v
        )
        for parameter in policy.trainable().values():
            parameter.grad = None
        with hooks:
            found = policy.predict(x, t, policy.encode([text])[0].expand(3))
        (found * weights).sum().backward()
        return found.detach(), _gradients(policy.trainable()), len(base.intersection(saved))

    def plain_gradients(self, policy: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The same from plain autograd, told to bear the networks' writing in place."""
        adapter = {key: p.detach().clone().requires_grad_() for key, p in policy.trainable().items()}
        with torch.autograd.graph.allow_mutation_on_saved_tensors(), native_policy.differentiable():
            found = self.reference(adapter)
            (found * self.inputs()[2]).sum().backward()
        return found.detach(), _gradients(adapter)


def _gradients(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zero where the answer does not depend on one."""
    return {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in parameters.items()}


def branch(a: Tensor, b: Tensor, scale: float) -> Callable[[Any, Any, Tensor], Tensor]:
    return lambda module, given, output: output + scale * (given[0] @ a.T @ b.T)


def randomise(policy: Any) -> None:
    """An adapter that does something."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, as a share of its largest value."""
    size = max(float(value.abs().max()) for value in theirs.values())
    return max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) / size
