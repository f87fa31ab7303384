"""Trainings in processes of their own, to be killed, interrupted and run side by side.

Importing torch and diffusers takes seconds; a fork server does it once and forks a fresh process for every training.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import bright
import tiny  # brings the parts of diffusers and transformers that a tiny model needs
import torch
from peft import LoraConfig  # the policy imports it late

from dgpo_core import checkpoint, run, train

PRELOADED = (tiny, LoraConfig)
ROOT = Path(train.__file__).parents[1]
LONG = 900  # seconds; only a test that hangs takes them


def context() -> BaseContext:
    """A fork server that has imported all this, where the system can fork; else fresh processes, which is slower."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["processes"])
    return server


def start(
    folder: Path, argv: Sequence[str], fault: str = "", rank: int = 0, size: int = 1, port: int = 0
) -> BaseProcess:
    """`dgpo_core.train` with these arguments in `folder`; what it prints goes to output-<rank>.txt there.

    fault: the name of a function of this module that is called first. rank, size, port: as `torchrun` would set them.
    """
    process = context().Process(target=_train, args=(folder, list(argv), fault, rank, size, port))
    process.start()
    return process


def finish(process: BaseProcess) -> int:
    """Its exit code: negative for the signal that ended it."""
    process.join(LONG)
    if process.is_alive():
        process.kill()
        raise TimeoutError
    return process.exitcode


def train_in(folder: Path, argv: Sequence[str], fault: str = "") -> int:
    """Runs a training to its end; its exit code."""
    return finish(start(folder, argv, fault))


def train_together(folder: Path, argv: Sequence[str], size: int) -> list[int]:
    """One training over `size` gloo processes; their exit codes."""
    port = free_port()
    return [finish(p) for p in [start(folder, argv, "", rank, size, port) for rank in range(size)]]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    """Until the condition holds or the process ends."""
    end = time.monotonic() + LONG
    while not condition() and process.is_alive():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.005)


def _train(folder: Path, argv: list[str], fault: str, rank: int, size: int, port: int) -> None:
    os.chdir(folder)
    output = os.open(f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if size > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    bright.register()
    if fault:
        globals()[fault]()
    sys.exit(train.main(argv))


# --- faults ----------------------------------------------------------------------------------------------------------


def die_while_writing_step_2() -> None:
    """kill -9 in the middle of the second checkpoint's bytes."""
    real = checkpoint.save_file

    def half(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        real(tensors, path, metadata)
        if '"step": 2' in metadata["info"]:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = half


def die_before_naming_step_4() -> None:
    """kill -9 with all bytes of the fourth checkpoint written under its temporary name."""
    real = os.replace

    def never(source: Path, target: Path) -> None:
        if str(target).endswith("step_000004.safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    run.os.replace = never
