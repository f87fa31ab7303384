"""The states of a run on disk: `output/dgpo/<run>/<root>/`, one checkpoint per state, named by what made it.

A state's key is a hash of the state before it and of all that the step depended on, so the same step is never taken
twice, another setting leads to another state, and nothing that is there is ever overwritten with something else.
Nothing here knows ComfyUI.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dgpo_core.checkpoint import load_checkpoint, save_checkpoint
from dgpo_core.config_io import to_plain
from dgpo_core.errors import UserError
from dgpo_core.files import write_atomic

from .values import PolicyHandle, PolicySpec, key_of

KEEP = 5  # newest states that stay on disk


@dataclass(frozen=True, eq=False)
class State:
    """A trainer's state, on the CPU: flat tensors, its `info`, and one record of metrics per iteration so far."""

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]

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
                f"Run {self.spec.run!r} no longer has the state that is asked for; it keeps the newest {KEEP}. Set the"
                " iteration to a later one, or to 0 to start anew."
            )
        tensors, info = load_checkpoint(self._path(key))
        return State(tensors, info["trainer"], info["history"])

    def save(self, key: str, state: State) -> None:
        """Writes the state, makes it the run's newest at its step, and deletes the oldest beyond `KEEP`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self._path(key), state.tensors, {"trainer": state.info, "history": state.history})
        self.follow(key, state)
        self._prune()

    def follow(self, key: str, state: State) -> None:
        """From here on the run goes by this state: later steps of another branch are forgotten (not deleted)."""
        line = {step: k for step, k in self._line().items() if step < state.step} | {state.step: key}
        write_atomic(self._line_path, json.dumps({"spec": to_plain(self.spec), "states": line}, indent=1) + "\n")

    def at(self, step: int) -> PolicyHandle:
        """The run's state after `step` steps. Raises UserError if it has not come so far."""
        if step == 0:
            return PolicyHandle(self.spec, 0, self.root)
        line = self._line()
        if step not in line:
            raise UserError(
                f"Run {self.spec.run!r} with these settings has made {max(line, default=0)} iterations, so iteration"
                f" {step} cannot follow: set the iteration to {max(line, default=0)}, or to 0 to start anew."
            )
        return PolicyHandle(self.spec, step, line[step])

    def newest(self) -> int:
        """The steps that the run has made."""
        return max(self._line(), default=0)

    @property
    def _line_path(self) -> Path:
        return self.folder / "run.json"

    def _line(self) -> dict[int, str]:
        try:
            states = json.loads(self._line_path.read_text(encoding="utf-8"))["states"]
        except (OSError, ValueError, KeyError):
            return {}
        return {int(step): key for step, key in states.items() if self.has(key)}

    def _path(self, key: str) -> Path:
        return self.folder / f"state_{key}.safetensors"

    def _prune(self) -> None:
        paths = sorted(self.folder.glob("state_*.safetensors"), key=os.path.getmtime)
        for path in paths[:-KEEP]:
            with contextlib.suppress(OSError):  # another process may read it
                path.unlink()


def root_key(spec: PolicySpec) -> str:
    """The key of the state before the first step: of all that it depends on, not of where it runs."""
    model = {"path": Path(spec.model.path).name, "family": spec.model.family, "dtype": spec.model.dtype}
    return key_of("root", model, spec.lora, spec.seed)
