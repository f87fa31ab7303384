"""Work on tensors without storage: torch's "meta" device stands for the accelerator, and nothing is computed.

The engine asks such tensors for a few numbers (is the loss finite?) and takes others to the processor (prompts'
embeddings): here is what it then gets. And attention takes the kernels of the device that is meant, none of which ever
holds a matrix of all tokens times all tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dgpo_core.benchmark.known import MADE_OF_NUMBERS, META, Known

_aten = torch.ops.aten


_READ = 4096


class Answers(TorchDispatchMode):
    """What tensors without storage are asked for: their numbers, where they are known; else ones, and on the processor
    room and no more.

    What an operation gives for tensors of some shapes is asked of torch once: it takes longer than all else here. It is
    a mode of its own, or what a `Ledger` asks in the place of torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers = Known()
        self._forms: dict[Hashable, tuple[_Form | None, ...] | list[_Form | None] | _Form | None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `count.Ledger`

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return self.answer(func, args, kwargs, self.question(func, args, kwargs))

    def question(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable | None:
        """The operation and all that the form of its answer depends on; None where that is whole numbers as well."""
        if func.overloadpacket in MADE_OF_NUMBERS:
            return None
        about, options = _described(args), _described(kwargs.items()) if kwargs else ()
        return None if about is None or options is None else (func, about, options)

    def answer(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], question: Hashable | None = None
    ) -> Any:
        """What the operation gives; question: what `question` gave for it."""
        form = self._forms.get(question) if question else None
        if form is not None:
            return _made(form)
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            known = self.numbers.of(args[0])
            return torch.ones((), dtype=args[0].dtype).item() if known is None else known.item()
        if func is _aten._to_copy.default and args[0].is_meta:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type != "meta":
                return self._taken(args[0], device, kwargs.get("dtype") or args[0].dtype)
        gives = _gives(func)
        if gives == "other":
            return func(*args, **kwargs)
        if gives == "changed":
            if not all(tensor.is_meta for tensor in (args[0] if isinstance(args[0], list) else [args[0]])):
                return func(*args, **kwargs)
            self.numbers.change(func, args, kwargs)
            return args[0] if func._schema.returns else None
        made = None if question else self.numbers.new(func, args, kwargs)
        return self._new(func, args, kwargs, question) if made is None else made

    def _taken(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A copy elsewhere. Of a few numbers somebody may read them; of weights nobody does, and they would fill the
        memory."""
        known = self.numbers.of(tensor)
        if known is not None:
            return known.to(device, dtype, copy=True)
        if tensor.numel() > _READ:
            return torch.empty(tensor.shape, dtype=dtype, device=device)
        return torch.full(tensor.shape, 1 if dtype.is_floating_point else 0, dtype=dtype, device=device)

    def _new(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], question: Hashable | None) -> Any:
        """New tensors, whose forms are kept for when the same is asked again."""
        out = func(*args, **kwargs)
        if question is None:
            return out
        tensors = (out,) if isinstance(out, Tensor) else out
        forms = [_Form.of(tensor) for tensor in tensors]
        if all(form is None or form.fits(tensor) for form, tensor in zip(forms, tensors, strict=True)):
            self._forms[question] = forms[0] if isinstance(out, Tensor) else type(out)(forms)
        return out


def _made(form: Any) -> Any:
    """What `_Form`s stand for, alone or several."""
    if isinstance(form, _Form):
        return form.make()
    made = [one and one.make() for one in form]
    return tuple(made) if isinstance(form, tuple) else made


class _Form(NamedTuple):
    """A tensor without storage, to be made again."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Any) -> _Form | None:
        return _Form(tensor.shape, tensor.stride(), tensor.dtype) if isinstance(tensor, Tensor) else None

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=META)

    def fits(self, tensor: Tensor) -> bool:
        """Whether `make` gives such a tensor."""
        return tensor.is_meta and self.make().untyped_storage().nbytes() == tensor.untyped_storage().nbytes()


@functools.cache
def _gives(func: Any) -> Literal["new", "changed", "other"]:
    """What an operation does: it gives new tensors, or changes the numbers of its first argument, and nothing else."""
    schema = func._schema
    returns = [str(r.type) for r in schema.returns]
    if returns and not schema.is_mutable and all(r.alias_info is None for r in schema.returns):
        return "new" if all(kind in ("Tensor", "Optional[Tensor]", "List[Tensor]") for kind in returns) else "other"
    written = [place for place, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return "changed" if written == [0] and torch.Tag.inplace_view not in func.tags else "other"


def _described(values: Iterable[Any]) -> tuple[Any, ...] | None:
    """All that the shapes of an operation's answer depend on, as a key; None where there are whole numbers in it."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            dtype = value.dtype
            if not (dtype.is_floating_point or dtype.is_complex):
                return None
            found.append((value.shape, value.stride(), dtype, value.is_meta))
        elif isinstance(value, tuple | list):
            inner = _described(value)
            if inner is None:
                return None
            found.append(inner)
        else:
            found.append((type(value), value))
    return tuple(found)


@contextmanager
def standing_in(thing: object, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block an object has other attributes."""
    before = {name: vars(thing).get(name) for name in attributes}
    vars(thing).update(attributes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                vars(thing).pop(name)
            else:
                vars(thing)[name] = value


@contextmanager
def numbers_kept() -> Iterator[None]:
    """Inside the block `torch.tensor` puts its numbers on the processor before they leave for the device "meta": there
    at once they would be lost before `Answers` sees them."""
    known = torch.tensor

    def tensor(data: Any, **options: Any) -> Tensor:
        device = options.get("device")
        if device is None or torch.device(device).type != "meta":
            return known(data, **options)
        return known(data, **options | {"device": "cpu"}).to(device)

    with standing_in(torch, {"tensor": tensor}):
        yield


@contextmanager
def attention_of(like: str) -> Iterator[None]:
    """Inside the block torch's attention, on tensors without storage, is the kernel that a device would take.

    like: "cuda" or "cpu". On CUDA flash attention takes numbers of 16 bits without a mask and heads of at most 256
    channels; the memory-efficient kernel takes all else.
    """
    known, own = F.scaled_dot_product_attention, {"cuda": _on_cuda, "cpu": _on_cpu}[like]

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (own if query.is_meta else known)(query, *args, **kwargs)

    with standing_in(F, {"scaled_dot_product_attention": attention}):
        yield


def _on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.element_size() == 2 and attn_mask is None and query.shape[-1] <= 256:
        return _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
    )[0]


def _on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def cuda_workspace(operation: Any, arguments: Sequence[Any]) -> int:
    """Bytes that cuDNN takes while it convolves numbers of 16 bits: its kernels want the channels last, so the input is
    copied. (Counted with it, the VAEs of SD3.5-M and SDXL take what was measured on an H100, within 4 %.)"""
    if operation is not _aten.convolution.default or arguments[0].element_size() != 2:
        return 0
    return arguments[0].numel() * 2
