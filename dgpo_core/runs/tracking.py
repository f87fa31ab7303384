"""A run's numbers and pictures in TensorBoard, Weights & Biases or Trackio, through accelerate's trackers.

What a tracker cannot do never ends a training: the first failure is told, and the run goes on without it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dgpo_core.common.packages import missing
from dgpo_core.common.terminal import say
from dgpo_core.settings.config import NO_TRACKER, Config
from dgpo_core.settings.values import to_dict

PROJECT = "dgpo"
"""What runs are gathered under where a tracker has projects."""


def require(name: str) -> None:
    """Raises UserError where the package of a tracker is not installed."""
    if name == NO_TRACKER:
        return
    from accelerate.tracking import get_available_trackers  # imported late: it takes a second

    if name not in [str(kind) for kind in get_available_trackers()]:
        raise missing(f"--track {name}", name)


class Tracking:
    """One tracker of one run. backend: accelerate's, already started; None once it has failed."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    @staticmethod
    def start(config: Config, folder: Path) -> Tracking | None:
        """That of the settings; TensorBoard's files are in `folder`/tensorboard. None where there is none."""
        if config.track == NO_TRACKER:
            return None
        tracking = Tracking(None)
        tracking._try(lambda: tracking._begin(config, folder))
        return tracking if tracking.backend is not None else None

    def metrics(self, record: Mapping[str, Any]) -> None:
        """The numbers of a record of metrics.jsonl, at its iteration; nested ones by path, as "seconds/update"."""
        numbers = {name: value for name, value in _flat(record) if name != "iteration" and _is_number(value)}
        if self.backend is not None:
            self._try(lambda: self.backend.log(numbers, step=record["iteration"]))

    def picture(self, name: str, png: bytes, step: int) -> None:
        """A picture, where the tracker takes any."""
        if not hasattr(self.backend, "log_images"):  # Trackio's takes none
            return
        image = Image.open(io.BytesIO(png)).convert("RGB")
        pixels = {"values": {name: np.asarray(image)[None]}, "dataformats": "NHWC"}  # as TensorBoard wants them
        given = pixels if self.backend.name == "tensorboard" else {"values": {name: [image]}}
        self._try(lambda: self.backend.log_images(**given, step=step))

    def close(self) -> None:
        """Sends what is left; may be called again."""
        if self.backend is not None:
            self._try(lambda: self.backend.finish())
        self.backend = None

    def _begin(self, config: Config, folder: Path) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[config.track]
        backend = kind("tensorboard", folder) if kind.requires_logging_directory else kind(PROJECT, name=config.name)
        backend.main_process_only = False  # only the leading process comes here, and accelerate need not be asked
        backend.start()
        self.backend = backend
        settings = {name: value if _is_number(value) else str(value) for name, value in _flat(to_dict(config))}
        backend.store_init_configuration(settings)

    def _try(self, work: Callable[[], Any]) -> None:
        """After the first failure there is no tracker any more."""
        try:
            work()
        except Exception as error:
            self.backend = None
            say(f"Warning: the tracker failed, and the run goes on without it: {type(error).__name__}: {error}")


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}/")
        else:
            yield f"{before}{name}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
