"""From the processor to where it is needed, without waiting for what is still at work there."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. An ordinary copy to an accelerator waits until all that is queued there is done; one from
    pinned memory is queued, too."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
