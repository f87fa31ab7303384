"""What is put on a MODEL's network while it trains, and taken off it again: instance forwards, nothing else.

Weights of a MODEL are inference tensors that ComfyUI moves, casts and patches as it likes. So Linears and convolutions
become frozen maps that borrow their weight when the backward needs it; the few other parameters (norms, scales) are
copied to tensors that autograd may keep, on the device where the network runs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import PatcherInjection
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dgpo_core.common.errors import UserError
from dgpo_core.policy.frozen_linear import LoraBank, frozen_conv, frozen_linear
from dgpo_core.policy.opaque import OpaqueLinear

from . import compiling
from .weights import is_linear, is_paged, lent, own_parameters, refuse_unknown

_FUSED = ("linear1", "linear2")  # the attention of Flux's single blocks, in one with their feed-forward
_CHECKPOINTED_UNITS = 6
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def target_shapes(network: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of the Linears whose names end in one of `targets`, by name; none given: all attention projections.

    Those are the Linears inside of modules that are called attention, of the image's and the text's stream, and what
    Flux has in their place. Raises UserError where there are none, and for weights that cannot be trained on.
    """
    ends = tuple(f".{end}" for end in targets)
    shapes = {}
    for name, module in network.named_modules():
        refuse_unknown(name, module)
        if is_linear(module) and (f".{name}".endswith(ends) if ends else _is_attention(name)):
            shapes[name] = tuple(module.weight.shape)
    if not shapes:
        wanted = f"on the targets {', '.join(targets)}" if targets else "by itself: name some as targets"
        raise UserError(f"No layer of the MODEL can carry a LoRA {wanted}.")
    return shapes


def _is_attention(name: str) -> bool:
    *within, last = name.split(".")
    return last in _FUSED or any("attn" in part or "attention" in part for part in within)


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

    network: a MODEL's diffusion model; checkpointing: recompute the blocks in the backward, read at every injection;
    keep_inputs: from copies of what they were given, where others write into that (ControlNets of UNets do); compiler:
    the backend that compiles the repeated blocks, "" for none, read at every injection.
    """

    def __init__(self, network: nn.Module, bank: LoraBank) -> None:
        self.network, self.bank = network, bank
        self.checkpointing = self.keep_inputs = False
        self.compiler = ""
        self._opaque: dict[str, OpaqueLinear] = {}  # by name, of the Linears in compiled blocks
        self._compiled: dict[nn.Module, Callable] = {}  # by block
        self._targets = frozenset(bank.targets)
        self._replaced: list[tuple[nn.Module, Callable, Callable | None]] = []
        self._parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._pages: list[tuple[nn.Module, Any]] = []

    @property
    def backward_units(self) -> int:
        """What a forward and its backward need, for one of what ComfyUI reserves for a forward alone.

        Counted on full-size models by tests/comfy/inside/comfy_native_reserve.py: blocks keep about one unit each; with
        checkpointing their inputs and one block at a time are 2 to 4; the gradients on their way down are 1.
        """
        return _CHECKPOINTED_UNITS + (0 if self.checkpointing else len(_blocks(self.network)))

    def injection(self) -> PatcherInjection:
        """For `ModelPatcher.set_injections`: ComfyUI injects after it has loaded the weights, ejects before it moves
        them, and ejects wherever another clone of the MODEL is loaded."""
        return PatcherInjection(inject=lambda patcher: self._inject(patcher.load_device), eject=lambda _: self.eject())

    def _inject(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # weights are loaded in inference mode
            blocks = [block for block in self._repeated() if "forward" not in vars(block)]
            within = {part for block in blocks for part in block.modules()}
            for name, module in self.network.named_modules():
                if is_linear(module) and module in within:
                    self._put(module, self._traceable(module, name).forward)
                elif is_linear(module):
                    self._replace(module, functools.partial(self._linear, module, name))
                elif _is_plain_convolution(module):
                    self._replace(module, functools.partial(_convolution, module))
                else:
                    self._own_parameters(module, device)
                    if _is_norm(module) and module in within and "forward" not in vars(module):
                        self._put(module, types.MethodType(_own_norm, module))
                    elif _is_norm(module):
                        self._replace(module, _norm)
            for block in blocks:
                self._put(block, self._compiled_forward(block))
            for block in _blocks(self.network) if self.checkpointing else ():
                self._replace(block, self._block)

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
        for module, page in self._pages:
            module._v = page
        self._replaced, self._parameters, self._pages = [], [], []

    def _replace(self, module: nn.Module, forward: Callable) -> None:
        """`forward(original, ...)` in place of the module's own."""
        self._put(module, functools.partial(forward, module.forward))

    def _put(self, module: nn.Module, ours: Callable) -> None:
        self._replaced.append((module, ours, vars(module).get("forward")))
        module.forward = ours

    def _own_parameters(self, module: nn.Module, device: torch.device) -> None:
        """Tensors that autograd may save, in place of the module's own parameters."""
        for name, own in own_parameters(module, device).items():
            self._parameters.append((module, name, module._parameters[name]))
            module._parameters[name] = nn.Parameter(own, requires_grad=False)
        if is_paged(module):
            self._pages.append((module, vars(module).pop("_v")))

    def _repeated(self) -> list[nn.Module]:
        return compiling.repeated(self.network) if self.compiler else []

    def _traceable(self, module: nn.Module, name: str) -> OpaqueLinear:
        """A Linear in a compiled block; the same at each injection, as backwards come when it is ejected."""
        if name not in self._opaque:
            weight = functools.partial(lent, module)
            self._opaque[name] = OpaqueLinear(name, tuple(module.weight.shape), weight, self.bank)
        self._opaque[name].product = module.forward
        return self._opaque[name]

    def _compiled_forward(self, block: nn.Module) -> Callable:
        if block not in self._compiled:
            self._compiled[block] = compiling.compiled(block.forward, self.compiler)
        return self._compiled[block]

    def _block(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.keep_inputs:
            args, kwargs = _copied((args, kwargs), tensors=True)
        return _checkpointed(self.bank.dropout.remembering(original), *args, **kwargs)

    def _linear(self, module: nn.Module, name: str, original: Callable, x: Tensor) -> Tensor:
        y = frozen_linear(x, original, functools.partial(lent, module, x.dtype, x.device))
        return self.bank.add(name, x, y) if name in self._targets else y


def _convolution(module: nn.Conv2d, original: Callable, x: Tensor) -> Tensor:
    weight = functools.partial(lent, module, x.dtype, x.device)
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


def _own_norm(norm: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The same as a method, which a compiler takes for one that all norms have."""
    return _norm(functools.partial(type(norm).forward, norm), x, *args, **kwargs)


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
    return sum(is_linear(part) or isinstance(part, _CONVOLUTIONS) for part in module.modules())


def _checkpointed(original: Callable, *args: Any, **kwargs: Any) -> Any:
    """The block, computed again in the backward from what it was given: it may write into that, so it gets copies."""
    if not torch.is_grad_enabled():
        return original(*args, **kwargs)
    given = _copied((args, kwargs), tensors=False)  # the network writes on in its options: keep them as they are now

    def run(*_: Tensor) -> Any:
        with differentiable():
            positional, named = _copied(given, tensors=True)
            return original(*positional, **named)

    # torch looks at its arguments for the device whose random state it keeps, and refuses to compute anew from one that
    # was written into
    return checkpoint(run, *(value for value in args if isinstance(value, Tensor)), use_reentrant=False)


def _copied(value: Any, tensors: bool) -> Any:
    """Tuples and nested dictionaries anew; the tensors in them, too, if they are asked for."""
    if isinstance(value, Tensor):
        return value.clone() if tensors else value
    if isinstance(value, tuple):
        return tuple(_copied(part, tensors) for part in value)
    if isinstance(value, dict):
        return {key: _copied(part, tensors) if isinstance(part, Tensor | dict) else part for key, part in value.items()}
    return value
