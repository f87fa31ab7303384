"""Where the model of a policy comes from: one function for each `PolicySpec.source`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from dgpo_core import assemble
from dgpo_core.config import Config
from dgpo_core.distributed import World
from dgpo_core.policy import Policy

from . import host, native_models
from .native_policy import NativePolicy
from .values import PolicySpec


@dataclass(frozen=True)
class Opened:
    """A policy with its fresh adapters, not yet on the device.

    size: (height, width) in pixels that it was made for; load: brings it to where it computes, and makes room there;
    current: whether it is still on the model that its spec means.
    """

    policy: Policy
    size: tuple[int, int]
    load: Callable[[], None]
    current: Callable[[], bool] = lambda: True


def files(spec: PolicySpec) -> Opened:
    """A model of diffusers' from ComfyUI's folders."""
    model = replace(spec.model, path=host.model_path(spec.model.path), device="cpu")
    if model.dtype == "auto":  # it is loaded on the CPU, but does not work there
        model = replace(model, dtype="float32" if host.device().type == "cpu" else "bfloat16")
    lora = replace(spec.lora, init=host.lora_path(spec.lora.init))
    config = Config(seed=spec.seed, model=model, lora=lora, memory=spec.memory)
    policy, size = assemble.load_model(config, World("cpu"))
    return Opened(policy, size, functools.partial(host.load, host.resident(policy)))


def native(spec: PolicySpec) -> Opened:
    """A MODEL, CLIP and VAE that ComfyUI has loaded, as they are."""
    name, lora = spec.model.path, spec.lora
    parts = native_models.find(name)
    policy = NativePolicy(*parts, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=spec.seed)
    size = assemble.prepare(policy, Config(model=spec.model, memory=spec.memory))
    return Opened(policy, size, policy.load, lambda: not native_models.means_another(name, policy.patcher.model))


SOURCES: dict[str, Callable[[PolicySpec], Opened]] = {"files": files, "native": native}
