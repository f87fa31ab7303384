"""Weights in memory of their own, wherever they came from."""

from torch import nn


def own_memory(module: nn.Module) -> None:
    """Copies weights that are views of a mapped file to memory of their own.

    There they are aligned, which a matrix product's last bits depend on: the same weights give the same image whatever
    file they came from; and a file that is replaced during the run does no harm.
    """
    for parameter in module.parameters():
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
