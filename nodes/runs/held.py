"""What this process holds of the runs besides their folders: loaded models, and what became of runs since it started.

There is one `Held`, `HELD`: made when ComfyUI imports the nodes, and gone with the process. After a restart it is
empty, and nothing is lost by that but the time to load a model and the one step that nobody has kept.
Only the thread in which ComfyUI runs nodes touches it. There, `execute` and `fingerprint_inputs` of one node follow
those of another, so nothing is locked; a route or a thread of our own must leave it alone.
Nothing here knows ComfyUI.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dgpo_core.policy import Policy
from dgpo_core.settings.config import Config

from ..common.bounded import Bounded
from ..common.values import PolicyHandle, PolicySpec
from .states import State

if TYPE_CHECKING:  # it knows ComfyUI
    from .sources import Opened

MOST_MODELS = 1


@dataclass
class LoadedModel:
    """`fresh` is its state before the first step; `last` the state that was left, with its key.

    fits: by batch setting, the most samples at once since the accelerator's memory ran out; empty where it never did.
    chosen: by batch setting, samples at once where the settings leave it open; empty where nothing was counted.
    recompute: whether activations are, as it was chosen; None where nothing was.
    """

    opened: Opened
    fresh: State
    last: tuple[str, State]
    fits: dict[str, int] = field(default_factory=dict)
    chosen: dict[str, int] = field(default_factory=dict)
    recompute: bool | None = None

    @property
    def policy(self) -> Policy:
        return self.opened.policy

    def choose(self, config: Config) -> None:
        """What settings leave open is as in `config`."""
        self.chosen.update({"rollout_batch": config.rollout.at_once, "micro_batch": config.training.at_once})
        recompute = config.memory.recompute
        if self.recompute == recompute:  # it may since have been turned on for want of memory
            return
        self.recompute = recompute
        if recompute:
            self.policy.enable_gradient_checkpointing()
        else:
            self.policy.disable_gradient_checkpointing()


class Held:
    """models: by what they depend on, at most `MOST_MODELS`; one that goes leaves the accelerator.

    A model whose weights are ComfyUI's goes once no output that ComfyUI keeps is about it: another workflow, or the
    button that frees memory, then frees them, too.
    """

    def __init__(self) -> None:
        self.models: Bounded[LoadedModel] = Bounded(MOST_MODELS, lambda model: model.policy.to("cpu"))
        self._users: dict[str, dict[int, weakref.ref[PolicySpec]]] = {}  # by a model's key
        self._turns: Counter[str] = Counter()  # by run
        self._at: dict[str, str] = {}  # by run, the state that it goes by
        self._moves = 0
        self._followed: set[Path] = set()  # folders of the runs that went on here

    def model(self, key: str, spec: PolicySpec, make: Callable[[PolicySpec], LoadedModel]) -> LoadedModel:
        """The model under this key; made where there is none, or one of weights that ComfyUI has loaded anew since."""
        known = self.models.get(key)
        if known and not known.opened.current():
            self.models.drop(key)
        model = self.models.take(key, lambda: make(spec))
        if model.opened.borrowed:
            self._keep_for(key, spec)
        return model

    def _keep_for(self, key: str, spec: PolicySpec) -> None:
        """The model goes with the last of the specs that it was kept for. Handles and groups of a run share theirs."""
        thread, user = threading.get_ident(), id(spec)

        def leave(_: weakref.ref[PolicySpec]) -> None:
            users.pop(user)
            if users:
                return
            del self._users[key]
            # in another thread, where only the collection of garbage ends one, the next model takes its place
            if self.models.get(key) and threading.get_ident() == thread:
                self.models.drop(key)

        users = self._users.setdefault(key, {})
        users.setdefault(user, weakref.ref(spec, leave))

    def state(self, key: str) -> State | None:
        """The state of this key, where a model was left in it."""
        return next((state for other, state in (model.last for model in self.models) if other == key), None)

    def furthest(self) -> int:
        """The most steps of any state in which a model was left."""
        return max((model.last[1].step for model in self.models), default=0)

    def turns(self, run: str | None) -> int:
        """How often the run (None: any) was taken to another branch, or lost its folder."""
        lost = [folder.parent.name for folder in self._followed if not folder.exists()]
        turns = self._turns + Counter(lost)
        return turns.total() if run is None else turns[run]

    def steps_kept(self) -> int:
        """How often a run went on to another state, be it one that it has been in before."""
        return self._moves

    def note_writing(self, folder: Path) -> None:
        """To be called before anything is written into a run's folder: if it was lost, that counts for good."""
        if folder in self._followed and not folder.exists():
            self._followed.remove(folder)
            self._turns[folder.parent.name] += 1

    def note_kept(self, handle: PolicyHandle, folder: Path, turned: bool) -> None:
        """The run, whose folder this is, goes by the handle's state from here on; turned: it left another branch."""
        self._turns[handle.spec.run] += turned
        self._moves += self._at.get(handle.spec.run) != handle.state
        self._at[handle.spec.run] = handle.state
        self._followed.add(folder)


HELD = Held()
