"""The MODELs that native policies train: found again by what they are, and held by nobody here.

A handle on an edge names its MODEL by a fingerprint of weights, patches, options and conditionings, so that a run goes
on after a restart where the same files are loaded the same way. ComfyUI's own cache decides how long the MODEL is kept;
where it has none, handles do (`Models.keep`).

There is one `Models`, `MODELS`: made when ComfyUI imports the nodes, and gone with the process; after a restart the
nodes run, and say again what is there. ComfyUI's worker thread alone calls its methods. Python calls `_drop` where a
part goes, in whatever thread that is; it puts one new list in the place of another, and counts.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dgpo_core.common.errors import UserError

from ..common.fingerprint import fingerprint
from .texts import Conditioning, Texts


@dataclass(frozen=True)
class Parts:
    """What a policy is made of; encode: from a text, and the pictures that it is about, to a CONDITIONING."""

    model: Any
    encode: Callable[..., Conditioning]
    vae: Any


@dataclass(frozen=True, eq=False)
class _Entry:
    """Parts that may be gone: (model, the texts' source, vae), and how a text is read from the source."""

    refs: tuple[weakref.ref, ...]
    read: Callable[..., Conditioning]

    def parts(self) -> tuple[Any, ...]:
        """None in the place of what is gone."""
        return tuple(ref() for ref in self.refs)


class Models:
    """What policies are made of, by name, as long as ComfyUI keeps it."""

    def __init__(self) -> None:
        self._entries: dict[str, list[_Entry]] = {}  # by name: what is there and alike, the newest last
        self._named: dict[tuple[str, str], str] = {}  # by run and node: the name that was given out last
        self._lost: Counter[str] = Counter()  # by run

    def remember(self, model: Any, texts: Texts, vae: Any, run: str, node: str) -> str:
        """The name under which `find` gives these out: the family, and a fingerprint of all that an image depends on.

        run, node: of the policy, and the id of the node that asks; see `lost`.
        """
        whole = fingerprint(model, vae.patcher, texts.fingerprint)
        name = f"{type(model.model.model_config).__name__}-{whole[:16]}"
        parts, gone = (model, texts.source, vae), functools.partial(self._drop, name)
        others = [entry for entry in self._entries.get(name, []) if any(map(operator.is_not, entry.parts(), parts))]
        self._entries[name] = [*others, _Entry(tuple(weakref.ref(part, gone) for part in parts), texts.read)]
        self._named[run, node] = name
        return name

    def find(self, name: str) -> Parts:
        """Raises UserError where ComfyUI has dropped a part of it."""
        for entry in reversed(self._entries.get(name, [])):
            model, source, vae = entry.parts()
            if model is not None and source is not None and vae is not None:
                return Parts(model, functools.partial(entry.read, source), vae)
        raise UserError("The MODEL, VAE or texts of this policy are no longer in memory: queue the workflow once more.")

    def keep(self, name: str, owner: object) -> None:
        """Holds what is under the name as long as the owner lives, which must not be in its turn held by that.

        For a ComfyUI that drops every output as soon as its last reader has run (--cache-none).
        """
        weakref.finalize(owner, _let_go, self.find(name)).atexit = False

    def means_another(self, name: str, base: Any) -> bool:
        """Whether the name by now stands for MODELs on other networks than `base` alone: the same files, loaded
        again."""
        models = [entry.refs[0]() for entry in self._entries.get(name, [])]
        networks = [model.model for model in models if model is not None]
        return bool(networks) and all(network is not base for network in networks)

    def lost(self, run: str | None) -> int:
        """How often ComfyUI has dropped what the run's nodes (None: any) had named last: they have to run again.

        What a node has named before, of another MODEL, goes without a trace: nobody asks for it.
        """
        return self._lost.total() if run is None else self._lost[run]

    def _drop(self, name: str, gone: weakref.ref) -> None:
        before = self._entries.get(name, [])
        after = [entry for entry in before if all(ref is not gone for ref in entry.refs)]
        self._entries[name] = after
        if before and not after:
            self._lost.update(run for (run, _), newest in self._named.items() if newest == name)


def _let_go(_: Parts) -> None:
    """Nothing is left to do: that it was held was all."""


MODELS = Models()
