"""What every use of diffusers, transformers and the hub needs around it: one sentence for any error, and quiet."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """diffusers, transformers, safetensors and the hub raise all sorts of things about a bad model: one sentence."""
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {first_line(error)}.") from error


def first_line(error: Exception) -> str:
    """The first line of what an error says, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shown(lines[0].strip().rstrip(".:"))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and the notes that diffusers, transformers and bitsandbytes print while they load."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = of_diffusers.get_verbosity(), of_transformers.get_verbosity()
    packing = logging.getLogger("bitsandbytes")  # on CPUs it tells of kernels to be had, for what is not used here
    packing_level = packing.level
    bars = of_diffusers.is_progress_bar_enabled(), of_transformers.is_progress_bar_enabled()
    for library in (of_diffusers, of_transformers):
        library.set_verbosity(logging.ERROR)
        library.disable_progress_bar()
    packing.setLevel(logging.ERROR)
    try:
        yield
    finally:
        packing.setLevel(packing_level)
        for library, level, bar in zip((of_diffusers, of_transformers), levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
