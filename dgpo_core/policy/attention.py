"""Attention kernels that can be trained through."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def trainable_attention() -> Iterator[None]:
    """Inside the block torch's attention does not use cuDNN; what was allowed before is allowed again afterwards.

    cuDNN's kernel is torch's first choice on recent data-centre cards. Its backward failed on an H100 (torch 2.11) for
    Flux at 512 x 512, with an illegal memory access. Roll-outs go without it, too: they must see what is trained.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
