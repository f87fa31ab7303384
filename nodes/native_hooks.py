"""What is put on a MODEL's network while it trains, and taken off it again: instance forwards, nothing else.

Weights of a MODEL are inference tensors that ComfyUI moves, casts and patches as it likes. So Linears and convolutions
become frozen maps that fetch their weight when the backward needs it; the few other parameters (norms, scales) are
copied to tensors that autograd may keep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import PatcherInjection
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dgpo_core.errors import UserError
from dgpo_core.policy.frozen_linear import LoraBank, frozen_conv, frozen_linear

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj"),
    *("img_attn.qkv", "img_attn.proj", "txt_attn.qkv", "txt_attn.proj", "linear1", "linear2"),
)
"""Ends of the names of all attention projections: SD1.5 and SDXL; SD3; Flux (whose single blocks fuse theirs)."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def target_shapes(network: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of the Linears whose names end in one of `targets` (none given: TARGETS), by name.

    Raises UserError where there are none, and where the network's weights are quantised.
    """
    ends = tuple(targets) or TARGETS
    shapes = {}
    for name, module in network.named_modules():
        _refuse_quantised(name, module)
        if isinstance(module, nn.Linear) and f".{name}".endswith(tuple(f".{end}" for end in ends)):
            shapes[name] = (module.out_features, module.in_features)
    if not shapes:
        raise UserError(f"No layer of the MODEL can carry a LoRA on the targets {', '.join(ends)}.")
    return shapes


def _refuse_quantised(name: str, module: nn.Module) -> None:
    scaled = getattr(module, "scale_weight", None) is not None or getattr(module, "layout_type", None) is not None
    cast_linear = hasattr(module, "comfy_cast_weights") and type(module).__name__ == "Linear"
    if scaled or (cast_linear and not isinstance(module, nn.Linear)):
        raise UserError(f"The MODEL's weights are quantised ({name}): load the model with weights of a plain type.")


@contextmanager
def differentiable() -> Iterator[None]:
    """Inside, newer ComfyUIs use operations that have a backward (rotary embeddings have fused ones without)."""
    management = comfy.model_management
    before = getattr(management, "in_training", None)
    if before is None:  # an older one, which has no others
        yield
        return
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before


class Hooks:
    """The forwards of one network with the adapters of `bank` on its targets; see `injection`.

    network: a MODEL's diffusion model; checkpointing: recompute the blocks in the backward, read at every injection.
    """

    def __init__(self, network: nn.Module, bank: LoraBank) -> None:
        self.network, self.bank, self.checkpointing = network, bank, False
        self._targets = frozenset(bank.targets)
        self._replaced: list[tuple[nn.Module, Callable, Callable | None]] = []
        self._parameters: list[tuple[nn.Module, str, nn.Parameter]] = []

    def injection(self) -> PatcherInjection:
        """For `ModelPatcher.set_injections`: ComfyUI injects after it has loaded the weights, ejects before it moves
        them, and ejects wherever another clone of the MODEL is loaded."""
        return PatcherInjection(inject=lambda _: self._inject(), eject=lambda _: self.eject())

    def _inject(self) -> None:
        with torch.inference_mode(False):  # weights are loaded in inference mode
            for name, module in self.network.named_modules():
                if isinstance(module, nn.Linear):
                    self._replace(module, functools.partial(self._linear, module, name))
                elif _is_plain_convolution(module):
                    self._replace(module, functools.partial(_convolution, module))
                else:
                    self._own_parameters(module)
                    if _is_norm(module):
                        self._replace(module, _norm)
            for block in _blocks(self.network) if self.checkpointing else ():
                self._replace(block, _checkpointed)

    def eject(self) -> None:
        """The network as it was; nothing where nothing is injected."""
        for module, ours, before in reversed(self._replaced):
            if vars(module).get("forward") is not ours:  # another's hook has come and gone on top
                continue
            if before is None:
                del module.forward
            else:
                module.forward = before
        for module, name, parameter in self._parameters:
            module._parameters[name] = parameter
        self._replaced, self._parameters = [], []

    def _replace(self, module: nn.Module, forward: Callable) -> None:
        """`forward(original, ...)` in place of the module's own."""
        before = vars(module).get("forward")
        ours = functools.partial(forward, module.forward)
        self._replaced.append((module, ours, before))
        module.forward = ours

    def _own_parameters(self, module: nn.Module) -> None:
        """Autograd may save these: normal tensors that want no gradient, in place of the module's own parameters."""
        for name, parameter in module._parameters.items():
            if parameter is not None and (parameter.is_inference() or parameter.requires_grad):
                self._parameters.append((module, name, parameter))
                own = parameter.clone() if parameter.is_inference() else parameter.detach()
                module._parameters[name] = nn.Parameter(own, requires_grad=False)

    def _linear(self, module: nn.Linear, name: str, original: Callable, x: Tensor) -> Tensor:
        y = frozen_linear(x, original, functools.partial(_weight, module, x.dtype, x.device))
        return self.bank.add(name, x, y) if name in self._targets else y


def _weight(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight as the forward used it: cast, moved and with the user's patches."""
    if not hasattr(module, "weight_function"):  # one of torch's own
        return module.weight.to(device, dtype)
    return comfy.ops.cast_bias_weight(module, dtype=dtype, device=device, bias_dtype=dtype)[0]


def _convolution(module: nn.Conv2d, original: Callable, x: Tensor) -> Tensor:
    weight = functools.partial(_weight, module, x.dtype, x.device)
    options = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation, "groups": module.groups}
    return frozen_conv(x, original, weight, **options)


def _is_plain_convolution(module: nn.Module) -> bool:
    return (
        isinstance(module, _CONVOLUTIONS)
        and hasattr(module, "comfy_cast_weights")
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not any(module.children())


def _norm(original: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Flux adds to its activations in place, which a norm's backward needs as they were."""
    return original(x.clone() if x.requires_grad else x, *args, **kwargs)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost members of lists that hold more than one layer with weights: transformer and residual blocks."""
    found: list[nn.Module] = []

    def walk(module: nn.Module, within: bool) -> None:
        for child in module.children():
            container = isinstance(child, nn.ModuleList | nn.Sequential)
            if within and not container and _layers(child) > 1:
                found.append(child)
            else:
                walk(child, container)

    walk(network, False)
    return found


def _layers(module: nn.Module) -> int:
    return sum(isinstance(part, (nn.Linear, *_CONVOLUTIONS)) for part in module.modules())


def _checkpointed(original: Callable, *args: Any, **kwargs: Any) -> Any:
    """The block, computed again in the backward from what it was given: it may write into that, so it gets copies."""
    if not torch.is_grad_enabled():
        return original(*args, **kwargs)
    given = _copied((args, kwargs), tensors=False)  # the network writes on in its options: keep them as they are now

    def run() -> Any:
        with differentiable():
            positional, named = _copied(given, tensors=True)
            return original(*positional, **named)

    return checkpoint(run, use_reentrant=False, preserve_rng_state=False)


def _copied(value: Any, tensors: bool) -> Any:
    """Tuples and nested dictionaries anew; the tensors in them, too, if they are asked for."""
    if isinstance(value, Tensor):
        return value.clone() if tensors else value
    if isinstance(value, tuple):
        return tuple(_copied(part, tensors) for part in value)
    if isinstance(value, dict):
        return {key: _copied(part, tensors) if isinstance(part, Tensor | dict) else part for key, part in value.items()}
    return value
