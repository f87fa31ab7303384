"""What a MODEL's forward and backward take, counted on a network of the same shapes that has no storage.

The network is built once more from the MODEL's own configuration on torch's "meta" device. Where that gives another
network than the one that is there (a file of an unusual kind, nodes that put parts in), there is no count, and
ComfyUI's own estimates stand. Never counted: the VAE and the text encoders, which ComfyUI accounts for itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor, nn

from dgpo_core.benchmark.advice import SHORT
from dgpo_core.benchmark.count import Ledger, Phase
from dgpo_core.benchmark.weightless import META, Answers, attention_of, cuda_workspace
from dgpo_core.policy.families.hidream import mix_experts
from dgpo_core.policy.frozen_linear import LoraBank

from .hooks import Hooks, differentiable
from .texts import references

if TYPE_CHECKING:
    from .policy import NativePolicy

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counted:
    """Of one image: a forward alone, and one with its backward. base, adapters: bytes of the weights, of all three
    adapters with gradient and moments."""

    forward: Phase
    update: Phase
    base: int
    adapters: int


def shapes_of(model: Any, shape: Sequence[int], conditioning: Sequence[Any]) -> Mapping[str, Any]:
    """What the network is given beside latent [1,*shape] and time, as ComfyUI makes it of conditionings, without
    storage."""
    x = torch.zeros(1, *shape)
    with torch.no_grad():
        conds = comfy.samplers.process_conds(
            model, x, {"positive": conditioning}, x.device, latent_image=torch.zeros_like(x), seed=0
        )
    return {name: _bare(cond.cond) for name, cond in conds["positive"][0]["model_conds"].items()}


def count(
    model: Any,
    shape: Sequence[int],
    given: Mapping[str, Any],
    bank: Mapping[str, Any],
    dtype: torch.dtype,
    recompute: bool,
    attention: Callable[..., Tensor],
) -> Counted | None:
    """Of a MODEL's network (`model` is its BaseModel) on a latent [1,*shape]; None where it cannot be told.

    given: see `shapes_of`. bank: the LoRA: shapes, rank, alpha. dtype: that it computes in. attention: what ComfyUI
    calls for it.
    """
    try:
        twin = model.model_config.get_model({}, "", device=META).to(META)
        network = twin.diffusion_model.requires_grad_(False)
        if _described(network) != _described(model.diffusion_model):
            return None
        lora = LoraBank(bank["shapes"], rank=bank["rank"], alpha=bank["alpha"], seed=0, device=META)
        return _counted(network, lora, shape, given, dtype, recompute, attention)
    except Exception as error:  # whatever a network of somebody else's cannot do without numbers
        _log.debug("DGPO: not counted: %s", error, exc_info=True)
        return None


def _counted(
    network: nn.Module,
    bank: LoraBank,
    shape: Sequence[int],
    given: Mapping[str, Any],
    dtype: torch.dtype,
    recompute: bool,
    attention: Callable[..., Tensor],
) -> Counted:
    mix_experts(network)  # HiDream's gates cannot be asked without numbers; this keeps what the engine's own keeps
    hooks = Hooks(network, bank)
    hooks.checkpointing = recompute
    hooks._inject(META)
    rest = {name: _as(value, dtype) for name, value in given.items()}
    context, more = rest.pop("c_crossattn", None), rest.pop("c_concat", None)
    options = {"transformer_options": {"optimized_attention_override": attention}}
    ledger = Ledger(META, cuda_workspace)

    def forward() -> Tensor:
        x = torch.empty(1, *shape, device=META, dtype=dtype)
        x = x if more is None else torch.cat([x, more], dim=1)
        return network(x, torch.empty(1, device=META), context=context, control=None, **options, **rest)

    with differentiable(), attention_of("cuda"), Answers(), ledger:
        ledger.own((*network.parameters(), *network.buffers()), "base")
        for name in ("current", "old", "ema"):
            ledger.own(bank.state(name).values(), "adapters")
        adapters = ledger.live["adapters"]
        for parameter in bank.state("current").values():
            parameter.grad = torch.zeros_like(parameter)
            ledger.own([parameter.grad], "optimiser")
        with torch.no_grad(), bank.using("current"), ledger.phase("forward"):
            forward()
        with torch.enable_grad(), bank.using("current"), ledger.phase("update"):
            forward().float().square().mean().backward()
    return Counted(ledger.phases["forward"], ledger.phases["update"], ledger.live["base"], 2 * adapters)


def _described(network: nn.Module) -> dict[str, Any]:
    """The layers with weights and how large they are, however those are kept."""
    return {
        name: (
            getattr(module, "in_features", 0),
            getattr(module, "out_features", 0),
            getattr(module, "out_channels", 0),
        )
        for name, module in network.named_modules()
        if hasattr(module, "out_features") or hasattr(module, "out_channels")
    }


def _bare(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=META)
    return [_bare(part) for part in value] if isinstance(value, list) else value


def _as(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return [_as(part, dtype) for part in value] if isinstance(value, list) else value


class Counts:
    """What was counted of one policy's network: once for a size of latents and of the pictures that it sees besides.

    shapes: of the LoRA's targets; attention: what ComfyUI calls for it.
    """

    def __init__(self, policy: NativePolicy, shapes: Mapping[str, tuple[int, int]], attention: Callable) -> None:
        self.policy, self.shapes, self.attention = policy, shapes, attention
        self._known: dict[tuple[Any, ...], Counted | None] = {}

    def for_backward(self, x: Tensor, conditioning: Any, references: int, forward: float) -> float:
        """Bytes of a forward of x [B,C,...] and its backward: counted, or else so many times ComfyUI's own estimate of
        the `forward`. On a CPU, where nobody makes room, nothing is counted."""
        hooks = self.policy.hooks
        found = self.of(x.shape[1:], conditioning, references) if self.policy.device.type == "cuda" else None
        if found is None:
            return forward * hooks.backward_units
        return len(x) * found.update.peak["activations"] * SHORT[hooks.checkpointing]

    def of(
        self, shape: Sequence[int], conditioning: Any, references: int = 0, recompute: bool | None = None
    ) -> Counted | None:
        """What an image with a latent of this shape takes; None where it cannot be counted.

        recompute: whether activations are; None is as the policy does now.
        """
        policy = self.policy
        recompute = policy.is_gradient_checkpointing if recompute is None else recompute
        key = tuple(shape), references, recompute  # texts are of about one length
        if key not in self._known:
            model, adapters = policy.patcher.model, policy.adapters
            bank = {"shapes": self.shapes, "rank": adapters.rank, "alpha": adapters.alpha}
            given = shapes_of(model, shape, comfy.sampler_helpers.convert_cond(conditioning))
            self._known[key] = count(model, shape, given, bank, policy.dtype, recompute, self.attention)
        return self._known[key]

    def of_prompt(self, prompt: Any, height: int, width: int, recompute: bool) -> Counted | None:
        """The same for a prompt and the size of its pictures, 0 for the model's own."""
        policy = self.policy
        size = height or policy.default_size[0], width or policy.default_size[1]
        conditioning = policy.conditioning(prompt, size)
        return self.of(policy.latent_shape(*size), conditioning, references([conditioning]), recompute)
