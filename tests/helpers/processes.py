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

from dgpo_core import evaluate, train
from dgpo_core.method.update import Update
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.runs import checkpoint, run

PRELOADED = (tiny, LoraConfig)
ROOT = Path(train.__file__).parents[1]
LONG = 900  # seconds; only a test that hangs takes them


def context() -> BaseContext:
    """A fork server that has imported all this, where the system can fork; else fresh processes, which is slower."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    paths = [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
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


def train_together(folder: Path, argv: Sequence[str], size: int, fault: str = "") -> list[int]:
    """One training over `size` gloo processes; their exit codes."""
    port = free_port()
    return [finish(p) for p in [start(folder, argv, fault, rank, size, port) for rank in range(size)]]


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


def crawl_at_the_front() -> None:
    """Forwards of the first process take half a second longer."""
    real = DiffusersPolicy.predict

    def slow(policy: DiffusersPolicy, *args: object) -> torch.Tensor:
        time.sleep(0.5 if os.environ["RANK"] == "0" else 0)
        return real(policy, *args)

    DiffusersPolicy.predict = slow


def look_late() -> None:
    """The last process looks for the run's folder only when the first one has long made it."""
    real = run.Run.check

    def check(config: object) -> None:
        if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            end = time.monotonic() + 20
            while not os.path.exists("runs/test/config.yaml") and time.monotonic() < end:
                time.sleep(0.1)
        real(config)

    run.Run.check = staticmethod(check)


def run_out_of_memory_in_the_second_update() -> None:
    """The accelerator of the last process is too small for even one sample from the second update on."""
    real, updates = Update.accumulate, []

    def refuse(update: Update, tasks: object, total: int, micro_batch: int) -> object:
        updates.extend([1] if micro_batch > 1 else [])
        if len(updates) > 1 and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real(update, tasks, total, micro_batch)

    Update.accumulate = refuse


def measure_instead() -> None:
    """The command is `dgpo_core.evaluate`."""
    train.main = evaluate.main


def break_the_last_process() -> None:
    """An error that nobody has foreseen, in the first update."""
    real = Update.accumulate

    def fail(update: Update, *args: object) -> object:
        if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            raise ZeroDivisionError("a bug")
        return real(update, *args)

    Update.accumulate = fail
