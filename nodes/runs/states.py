"""The states of a run on disk: `output/dgpo/<run>/<root>/`, one checkpoint per state, named by what made it.

A state's key is a hash of the state before it and of all that the step depended on, so the same step is never taken
twice, another setting leads to another state, and nothing that is there is ever overwritten with something else. Which
of its states a run has come by last is in `run.json`.
Nothing here knows ComfyUI.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import TEMPORARY, reason, write_atomic
from dgpo_core.common.reading import read_json
from dgpo_core.evaluation.scores import Evaluation
from dgpo_core.runs.checkpoint import load_checkpoint, read_info, save_checkpoint
from dgpo_core.settings.values import to_plain

from ..common.values import PolicyHandle, PolicySpec, key_of

KEEP = 5  # states that stay on disk: those that were used last
WRITING_S = 3600  # seconds after which a file that is being written is one that a killed process left


@dataclass(frozen=True, eq=False)
class State:
    """A trainer's state, on the CPU: flat tensors, its `info`, and one record of metrics per iteration so far.

    line: the keys of the states from the first step on, this one's last.
    """

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]] = ()
    line: Sequence[str] = ()

    @property
    def step(self) -> int:
        return int(self.info["step"])


class Store:
    """The states that descend from one `PolicySpec`."""

    def __init__(self, runs: Path, spec: PolicySpec) -> None:
        self.root = root_key(spec)
        self.folder = runs / spec.run / self.root
        self.spec = spec

    def has(self, key: str) -> bool:
        """Whether the state can be loaded; the root is made by loading the model."""
        return key == self.root or self._path(key).is_file()

    def load(self, key: str) -> State:
        """Raises UserError if the state is not kept any longer, or damaged."""
        if not self._path(key).is_file():
            raise UserError(
                f"Run {self.spec.run!r} no longer has the state that is asked for, only the {KEEP} that were used last:"
                " set the iteration to a later one, or to 0 to start anew."
            )
        tensors, info = load_checkpoint(self._path(key))
        try:
            state = State(tensors, dict(info["trainer"]), list(info["history"]), [str(key) for key in info["line"]])
            if state.step == len(state.line):
                return state
        except (KeyError, TypeError, ValueError, OverflowError):
            pass
        raise UserError(f"The state {self._path(key)} is damaged: delete it, and set the iteration to an earlier one.")

    def furthest(self) -> int:
        """The most steps of any state that is there, on whichever branch of the run."""
        found = 0
        for path in self.folder.glob("state_*.safetensors"):
            with contextlib.suppress(UserError, KeyError, TypeError):
                found = max(found, len(read_info(path)["line"]))
        return found

    def nearest(self, line: Sequence[str], step: int) -> tuple[int, State] | None:
        """Of the states along `line`, the one after the number of steps nearest to `step` that can be loaded."""
        for other in sorted(range(1, len(line) + 1), key=lambda other: abs(other - step)):
            if self.has(line[other - 1]):
                with contextlib.suppress(UserError):
                    return other, self.load(line[other - 1])
        return None

    def save(self, key: str, state: State) -> None:
        """Writes the state, and deletes those not used for longest beyond `KEEP`, and what a killed process left half
        written. The run does not go by it yet."""
        self._make_folder()
        info = {"trainer": state.info, "history": list(state.history), "line": list(state.line)}
        save_checkpoint(self._path(key), state.tensors, info)
        self._prune(self._path(key))

    def follow(self, state: State) -> bool:
        """From here on the run goes by this state, which is saved; steps that follow on it stay the run's.

        True where the run was on another branch, whose steps no longer are the run's (but stay on disk).
        """
        before, line = self._line(), list(state.line)
        self.use(line[-1])
        if before[: len(line)] == line:
            return False
        write_atomic(self._line_path, json.dumps({"spec": to_plain(self.spec), "states": line}, indent=1) + "\n")
        return line[: len(before)] != before

    def use(self, key: str) -> None:
        """The state counts as used now."""
        with contextlib.suppress(OSError):
            os.utime(self._path(key))

    def save_evaluation(self, key: str, evaluation: Evaluation) -> None:
        """Writes what one of the states was measured by."""
        self._make_folder()
        evaluation.save(self._evaluation_path(key))

    def load_evaluation(self, key: str) -> Evaluation:
        """Raises UserError if it is not there, or damaged."""
        return Evaluation.load(self._evaluation_path(key))

    def at(self, step: int) -> PolicyHandle:
        """The run's state after `step` steps. Raises UserError if it has not come so far, or no longer has it."""
        if step == 0:
            return PolicyHandle(self.spec, 0, self.root)
        line = self._line()
        if step > len(line) or not self.has(line[step - 1]):
            raise UserError(self._no_state(step, len(line)))
        return PolicyHandle(self.spec, step, line[step - 1])

    def _no_state(self, step: int, made: int) -> str:
        newest = self.newest()
        why = (
            f"no longer has its state after {_iterations(step)}"
            if step <= made
            else f"with these settings has made {_iterations(made)}"
        )
        choice = f"to {newest}, or to 0 to start anew" if newest else "to 0"
        return f"Run {self.spec.run!r} {why}, so iteration {step} cannot follow: set the iteration {choice}."

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot make the folder {self.folder}: {reason(error)}.") from error

    def newest(self) -> int:
        """The last step of the run whose state is there."""
        return max((step for step, key in enumerate(self._line(), start=1) if self.has(key)), default=0)

    @property
    def _line_path(self) -> Path:
        return self.folder / "run.json"

    def _line(self) -> list[str]:
        """The keys of the run's states from its first step on; not all of them are still there."""
        try:
            return [str(key) for key in read_json(self._line_path, "The line of the run")["states"]]
        except (UserError, KeyError, TypeError):  # none yet, or spoilt by hand
            return []

    def _path(self, key: str) -> Path:
        return self.folder / f"state_{key}.safetensors"

    def _evaluation_path(self, key: str) -> Path:
        return self.folder / f"evaluation_{key}.safetensors"

    def _prune(self, newest: Path) -> None:
        others = [path for path in self.folder.glob("state_*.safetensors") if path != newest]
        left = [p for p in self.folder.glob(f".*{TEMPORARY}.*") if time.time() - _used(p) > WRITING_S]
        for path in [*sorted(others, key=_used)[: 1 - KEEP], *left]:
            with contextlib.suppress(OSError):  # another process may read it
                path.unlink()


def root_key(spec: PolicySpec) -> str:
    """The key of the state before the first step: of all that it depends on, not of where it runs."""
    model = {"path": spec.model.path, "family": spec.model.family, "dtype": spec.model.dtype}
    if spec.model.prediction != "auto":  # older runs, which knew no other, keep their keys
        model["prediction"] = spec.model.prediction
    if spec.model.kept_as != "none":
        model["quantize"] = spec.model.kept_as
    return key_of("root", model, spec.lora, spec.seed)


def _used(path: Path) -> float:
    """When it was last written or followed; 0 where another process has just deleted it."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _iterations(number: int) -> str:
    return f"{number} iteration" if number == 1 else f"{number} iterations"
