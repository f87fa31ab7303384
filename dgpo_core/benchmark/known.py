"""The whole numbers that tensors without storage stand for: ids, masks, places in a grid, how long parts are.

What a text encoder is given says by its values how much there is to do: which tokens are a picture's, how they are cut
into windows, whether anything is filled up. So beside every storage of whole numbers on the device "meta" that stems
from numbers which are known there is one on the processor, and whatever happens to the one happens to the other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage

META = torch.device("meta")
_CPU = torch.device("cpu")
_aten = torch.ops.aten
_MOST = 2**20  # numbers of a tensor that are kept
MADE_OF_NUMBERS = {_aten.arange, _aten.zeros, _aten.ones, _aten.full, _aten.scalar_tensor}
"""Operations that take no tensors, and whose arguments say which numbers they make."""
_UNSET = {_aten.empty_like, _aten.new_empty, _aten.new_empty_strided}


class Known:
    """Whole numbers by the storage of the tensors that stand for them; views of a storage are known with it."""

    def __init__(self) -> None:
        self._beside: dict[int, tuple[Any, UntypedStorage]] = {}  # its weak reference, and that on the processor

    def of(self, tensor: Tensor) -> Tensor | None:
        """The numbers, on the processor; None where nobody knows them."""
        if not tensor.is_meta:
            return tensor
        if tensor.is_floating_point():
            return None
        found = self._beside.get(tensor.untyped_storage()._cdata)
        if found is None:
            return None
        beside = torch.empty(0, dtype=tensor.dtype)
        return beside.set_(found[1], tensor.storage_offset(), tensor.shape, tensor.stride())

    def standing_for(self, value: Tensor) -> Tensor:
        """A tensor on the device "meta" whose numbers are those of `value`, a tensor on the processor."""
        own = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
        storage = made.untyped_storage()
        key = storage._cdata
        self._beside[key] = weakref.ref(storage, lambda _: self._beside.pop(key, None)), own.untyped_storage()
        return made

    def new(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What an operation gives that makes new tensors, where they are whole numbers and known; else None."""
        if not _of_whole_numbers(func, args, kwargs):
            return None
        known, options = self._beside_all(args), self._beside_all(dict(kwargs))
        if known is None or options is None:
            return self._picked(func, *args) if func is _aten.index.Tensor else None
        if "device" in options:
            options["device"] = _CPU
        out = func(*known, **options)
        given = (out,) if isinstance(out, Tensor) else out
        if any(value.is_floating_point() or value.is_complex() or value.numel() > _MOST for value in given):
            return None
        made = [self.standing_for(value) for value in given]
        return made[0] if isinstance(out, Tensor) else type(out)(made)

    def change(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Does to the numbers of the first argument what an operation does to it, or forgets them."""
        first = args[0]
        if not isinstance(first, Tensor) or first.is_floating_point() or self.of(first) is None:
            return
        known, options = self._beside_all(args), self._beside_all(dict(kwargs))
        if known is None or options is None:
            self._beside.pop(first.untyped_storage()._cdata)
        else:
            func(*known, **options)

    def _picked(self, func: Callable[..., Any], tensor: Tensor, indices: Sequence[Tensor | None]) -> Any:
        """What is picked by masks that are known from a tensor whose numbers nobody knows; else None."""
        places: list[Tensor | None] = []
        masked = False
        for index in indices:
            mask = self.of(index) if index is not None and index.dtype == torch.bool else None
            masked |= mask is not None
            places += [index] if mask is None else [where.to(META) for where in mask.nonzero().unbind(1)]
        return func(tensor, places) if masked else None

    def _beside_all(self, value: Any) -> Any:
        """Arguments with the numbers in the place of all that stand for them; None where some are not known."""
        if isinstance(value, Tensor):
            return self.of(value)
        if isinstance(value, list | tuple):
            found = [self._beside_all(one) for one in value]
            if any(new is None and old is not None for new, old in zip(found, value, strict=True)):
                return None
            return type(value)(found)
        if isinstance(value, dict):
            known = self._beside_all(list(value.values()))
            return None if known is None else dict(zip(value, known, strict=True))
        return value


def _of_whole_numbers(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation is given whole numbers on the device, or makes some there: quick to say, and mostly not."""
    tensors = [one for value in args for one in (value if isinstance(value, list | tuple) else (value,))]
    tensors = [one for one in tensors if isinstance(one, Tensor)]
    if any(one.is_meta and not (one.is_floating_point() or one.is_complex()) for one in tensors):
        return func.overloadpacket not in _UNSET
    device = kwargs.get("device")
    if device is None or torch.device(device).type != "meta":
        return False
    if tensors:  # they are brought there
        return not tensors[0].is_floating_point() and tensors[0].numel() <= _MOST
    if func.overloadpacket not in MADE_OF_NUMBERS:
        return False
    made = func(*args, **kwargs)
    return not made.is_floating_point() and made.numel() <= _MOST
