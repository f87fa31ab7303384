"""Numbers out of whatever a node gives: floats, lists, tensors, texts. Nothing here knows ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from dgpo_core.common.errors import UserError

_NUMBER = re.compile(r"(?:(?<![\d.])[-+])?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def numbers_in(value: Any) -> list[float]:
    """Every number in `value`, in order.

    Of a text, all numbers in it; of a tensor with more than one dimension (a mask, an image), the mean per row. Raises
    UserError for what holds no numbers.
    """
    if isinstance(value, (bool, int, float)):
        return [float(value)]
    if isinstance(value, str):
        return [float(text) for text in _NUMBER.findall(value)]
    if isinstance(value, Tensor):
        return value.float().flatten(1).mean(1).tolist() if value.ndim > 1 else value.float().reshape(-1).tolist()
    if isinstance(value, Mapping):
        return [number for item in value.values() for number in numbers_in(item)]
    if hasattr(value, "tolist"):
        return numbers_in(value.tolist())
    if isinstance(value, Iterable):
        return [number for item in value for number in numbers_in(item)]
    raise UserError(f"No scores can be read from a {type(value).__name__}: connect numbers, a list, a text or a mask.")
