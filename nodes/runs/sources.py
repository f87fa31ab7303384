"""Where the model of a policy comes from: one function for each `PolicySpec.source`."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.policy import Policy
from dgpo_core.runs import assemble
from dgpo_core.settings.config import Config

from ..common import host
from ..common.values import PolicySpec
from ..on_model import lora as native_lora
from ..on_model.hooks import target_shapes
from ..on_model.models import MODELS
from ..on_model.policy import NativePolicy
from ..on_model.sampling import decided

Lora = Mapping[str, Tensor]


@dataclass(frozen=True)
class Opened:
    """A policy with its fresh adapters, not yet on the device.

    size: (height, width) in pixels that it was made for; load: brings it to where it computes, and makes room there;
    current: whether it is still on the model that its spec means; patched: a MODEL of ComfyUI's with the policy's own
    LoRA (`Policy.lora_tensors`) on it; borrowed: whether the weights are ComfyUI's, which decides how long they stay.
    """

    policy: Policy
    size: tuple[int, int]
    load: Callable[[], None]
    patched: Callable[[Lora], Any]
    current: Callable[[], bool] = lambda: True
    borrowed: bool = False


def files(spec: PolicySpec) -> Opened:
    """A model of diffusers' from ComfyUI's folders."""
    model = replace(spec.model, path=host.model_path(spec.model.path), device="cpu")
    if model.dtype == "auto":  # it is loaded on the CPU, but does not work there
        model = replace(model, dtype="float32" if host.device().type == "cpu" else "bfloat16")
    lora = replace(spec.lora, init=host.lora_path(spec.lora.init))
    config = Config(seed=spec.seed, model=model, lora=lora, memory=spec.memory)
    policy, size = assemble.load_model(config, "cpu")
    return Opened(policy, size, functools.partial(host.load, host.resident(policy)), _no_model)


def native(spec: PolicySpec) -> Opened:
    """A MODEL and VAE that ComfyUI has loaded, as they are, and what reads texts for them."""
    name, lora = spec.model.path, spec.lora
    parts = MODELS.find(name)
    init = native_lora.read(host.lora_path(lora.init), parts.model) if lora.init else None
    targets = lora.targets
    if init is not None and not targets:
        targets = (*target_shapes(parts.model.model.diffusion_model, ()), *init.modules)
    settings = {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout, "targets": targets, "seed": spec.seed}
    prediction, network = spec.model.prediction, weakref.ref(parts.model.model)
    settings |= {"prediction": prediction, "quantize": spec.model.kept_as}
    policy = NativePolicy(parts.model, parts.encode, parts.vae, **settings)
    if init is not None:
        policy.load_lora(init)
    size = assemble.set_up(policy, Config(model=spec.model, memory=spec.memory))
    return Opened(
        policy,
        size,
        policy.load,
        lambda adapter: native_lora.apply(decided(MODELS.find(name).model.clone(), prediction), adapter),
        lambda: not MODELS.means_another(name, network()),
        borrowed=True,
    )


def _no_model(_: Lora) -> NoReturn:
    raise UserError(
        "This policy is on a model of its own, not on a MODEL of ComfyUI's: connect the trainer's lora and a MODEL to"
        " DGPO LoRA Loader instead."
    )


SOURCES: dict[str, Callable[[PolicySpec], Opened]] = {"files": files, "native": native}
