"""A frozen network in fewer bytes: its large Linears keep their weights as fp8, int8 or nf4, whole only while in use.

A loaded network is changed in place, so that a folder, a hub id, a single file and random weights all go the same way,
and peft puts its adapters on what it takes for ordinary Linears. The forward is `x @ weight.T` with the weight as it
was rounded, in the type of x; the backward makes the same weight anew, so the gradient is exact for it, and autograd
keeps nothing of the base.

Where the numbers come from. fp8 (e4m3) and int8 are torch's own types with a scale for each output row: a cast and a
product on any device, of which no library would take anything away. nf4 is bitsandbytes': it has packed kernels for
CUDA and CPU behind operators that torch knows, and its format is the one that others call nf4. Not taken: its int8,
which rounds the activations, too, so that the layer is no product with any weight; torchao, whose tensor subclasses
peft, offloading and compiling each treat in a way of their own, and whose module paths move from version to version;
quanto, which is no longer developed.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from dgpo_core.common.errors import UserError
from dgpo_core.common.packages import is_installed, missing
from dgpo_core.policy.frozen_linear import frozen_linear

NONE = "none"
_FP8 = torch.float8_e4m3fn
_LEAST = 1e-30  # a row of zeros has a scale, too
_BLOCK = 64  # weights that share one scale in nf4


class QuantisedLinear(nn.Linear):
    """A frozen Linear that keeps its weight in fewer bytes.

    shape: (out, in); dtype: the number type that `weight` is to have.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, bias: Parameter | None) -> None:
        nn.Module.__init__(self)  # Linear's own would make a weight
        self.out_features, self.in_features = shape
        self.register_parameter("bias", bias)
        self._dtype = dtype

    @abstractmethod
    def made(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as it was rounded, made anew of the layer's `parts`, or of copies of these elsewhere."""

    def parts(self) -> dict[str, Tensor]:
        """What the weight is kept as, by name."""
        return dict(self.named_buffers(recurse=False))

    def whole(self, dtype: torch.dtype) -> Tensor:
        """`made` of what the layer keeps, and where it lies."""
        return self.made(self.parts(), dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the layer computes with, in the base's type; each look makes it anew."""
        return self.whole(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self._product, functools.partial(self._lend, x.dtype))

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole(x.dtype), self.bias)

    def _lend(self, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
        return nullcontext(self.whole(dtype))


class PackedLinear(QuantisedLinear):
    """One that packs a weight [out, in] itself; `fits` says beforehand whether it can."""

    def __init__(self, weight: Tensor, bias: Parameter | None) -> None:
        super().__init__(weight.shape, weight.dtype, bias)
        self._pack(weight.detach())

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether a weight of this shape can be kept so."""
        return True

    @abstractmethod
    def _pack(self, weight: Tensor) -> None:
        """Puts the weight into buffers."""


class _Rows(PackedLinear):
    """Numbers of one byte, and a scale for each output row."""

    def _pack(self, weight: Tensor) -> None:
        most = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=_LEAST)
        packed, scale = self._rounded(weight.float(), most)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    @staticmethod
    @abstractmethod
    def _rounded(weight: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        """One byte for each number [out, in], and the scales [out, 1], by the largest of each row [out, 1]."""

    def made(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return parts["packed"].to(dtype).mul_(parts["scale"])


class Fp8Linear(_Rows):
    """float8_e4m3fn. Scales are powers of two: fp8 loses nothing by it, what was fp8 in its file stays what it was, and
    the weight is the same in every number type."""

    @staticmethod
    def _rounded(weight: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        largest = torch.finfo(_FP8).max
        scale = (most / largest).log2().ceil().exp2()
        return (weight / scale).clamp_(-largest, largest).to(_FP8), scale


class Int8Linear(_Rows):
    """Whole numbers from -127 to 127."""

    @staticmethod
    def _rounded(weight: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        scale = most / 127
        return (weight / scale).round_().to(torch.int8), scale


class Nf4Linear(PackedLinear):
    """Sixteen levels spread as a normal distribution is, two numbers a byte, and a scale for each 64 of them."""

    @staticmethod
    def fits(weight: Tensor) -> bool:
        return weight.numel() % _BLOCK == 0

    def _pack(self, weight: Tensor) -> None:
        # in rows of one block: bitsandbytes' kernel for CPUs reads rows that are shorter than a block wrongly
        blocks = weight.reshape(-1, _BLOCK)
        import bitsandbytes  # noqa: F401 - it registers the operators

        packed, scale = torch.ops.bitsandbytes.quantize_4bit(blocks, _BLOCK, "nf4", torch.uint8)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    def made(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        packed, scale = parts["packed"], parts["scale"]
        shape = [self.out_features * self.in_features // _BLOCK, _BLOCK]
        blocks = torch.ops.bitsandbytes.dequantize_4bit(packed, scale, _BLOCK, "nf4", shape, dtype)
        return blocks.view(self.out_features, self.in_features)


KINDS: dict[str, type[PackedLinear]] = {"fp8": Fp8Linear, "int8": Int8Linear, "nf4": Nf4Linear}
"""By the word of `model.quantize`; NONE leaves the network as it is."""


def refuse_unavailable(kind: str, device: torch.device) -> None:
    """Raises UserError for a kind that there is not, and for one that needs what this machine does not have."""
    if kind == NONE:
        return
    if kind not in KINDS:
        raise UserError(f"Unknown kind of quantised weights {kind!r}: use one of {', '.join((NONE, *KINDS))}.")
    if KINDS[kind] is Nf4Linear and not is_installed("bitsandbytes"):
        instead = "set model.quantize to fp8 or int8"
        raise missing("The kind nf4 of quantised weights", "bitsandbytes", "'bitsandbytes>=0.46'", instead)
    try:
        KINDS[kind](torch.ones(1, _BLOCK, device=device), None).whole(torch.float32)
    except (RuntimeError, NotImplementedError, TypeError, ImportError, AttributeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"Weights in {kind} do not work on the device {device} of this machine ({said}): set model.quantize to"
            " another kind or to none."
        ) from None


def quantise(network: nn.Module, kind: str, device: torch.device, keep: Sequence[str] = ()) -> None:
    """Makes the large Linears of a network quantised ones, in place, and where they lie; `device` does the work.

    kind: a key of KINDS. Large are those within lists of blocks; embeddings, the last projection, norms and
    convolutions stay as they are, and so do Linears whose names end in one of `keep`.
    """
    made = KINDS[kind]
    for name, linear in list(large_linears(network, keep)):
        if made.fits(linear.weight):
            within, _, last = name.rpartition(".")
            small = made(linear.weight.to(device), linear.bias).to(linear.weight.device)
            setattr(network.get_submodule(within), last, small.train(linear.training))


def within_blocks(network: nn.Module, keep: Sequence[str] = ()) -> Iterator[tuple[str, nn.Module]]:
    """The modules within lists of blocks, by name, without those whose names end in one of `keep`."""
    ends = tuple(f".{end}" for end in keep)
    lists = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, nn.ModuleList))
    for name, module in network.named_modules():
        if name.startswith(lists) and not name.endswith(ends):
            yield name, module


def large_linears(network: nn.Module, keep: Sequence[str] = ()) -> Iterator[tuple[str, nn.Linear]]:
    """The Linears of `within_blocks`."""
    for name, module in within_blocks(network, keep):
        if type(module) is nn.Linear:
            yield name, module
