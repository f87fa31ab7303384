"""A run's folder on disk: whole files or none, one writer at a time, and nothing lost but the last half-written line.

`runs/<name>/` holds config.yaml, metrics.jsonl, reward.png, samples/, evaluations/, lora.safetensors, checkpoints/ and
summary.json.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import TEMPORARY, reason, require_place_for, write_atomic
from dgpo_core.common.reading import parse_json, read_bytes, require_ordinary
from dgpo_core.runs.checkpoint import best_checkpoint, checkpoints
from dgpo_core.runs.tracking import Tracking, require
from dgpo_core.settings.config import MOST_ITERATIONS, Config
from dgpo_core.settings.resuming import base_settled, differences, filled
from dgpo_core.settings.yaml_file import load_yaml, to_yaml

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

MOST_METRICS = 2**30  # bytes of metrics.jsonl; a million iterations are less
SHORT = ("iteration", "reward")  # what the curve shows of an iteration
FOLDERS = ("samples", "checkpoints", "evaluations")


class Run:
    """The folder of one run, locked against a second process for as long as this object is open.

    Made by `open`; use it as a context manager, or `close` it.
    """

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock = lock
        self._metrics: int | None = None
        self._history: list[dict[str, Any]] | None = None
        self._tracking: Tracking | None = None

    config_path = property(lambda self: self.folder / "config.yaml")
    metrics_path = property(lambda self: self.folder / "metrics.jsonl")
    reward_png = property(lambda self: self.folder / "reward.png")
    lora_path = property(lambda self: self.folder / "lora.safetensors")
    summary_path = property(lambda self: self.folder / "summary.json")
    samples = property(lambda self: self.folder / "samples")
    checkpoints = property(lambda self: self.folder / "checkpoints")
    evaluations = property(lambda self: self.folder / "evaluations")

    def evaluation_path(self, iteration: int) -> Path:
        """Where the scores of an evaluation lie, image by image."""
        return self.evaluations / f"iteration_{iteration:06d}.safetensors"

    # --- opening -----------------------------------------------------------------------------------------------------

    @staticmethod
    def check(config: Config) -> None:
        """Raises the UserError that `open` would, before a model is loaded; leaves nothing behind."""
        folder = Path(config.output, config.name)
        require(config.track)
        if not config.resume:
            _refuse_occupied(folder)
            require_place_for(folder)
        elif not os.path.isdir(folder):
            raise UserError(f"There is no run to resume in {folder}: check --name and --output, or leave out --resume.")
        elif os.path.exists(folder / "config.yaml"):
            _check_same(folder, config)
            _check_files(folder)
        elif not _is_vacant(folder):
            raise UserError(f"{folder} is not the folder of a run (it has no config.yaml): check --name and --output.")

    @staticmethod
    def as_before(config: Config) -> Config:
        """Where a run is resumed, what the settings leave open is as it was chosen when the run began."""
        path = Path(config.output, config.name, "config.yaml")
        if not config.resume or not os.path.exists(path):
            return config
        # batches that nothing was chosen for, as on a CPU, may be chosen now
        return filled(config, base_settled(load_yaml(path)))

    @classmethod
    def open(cls, config: Config) -> "Run":
        """The folder `config.output`/`config.name`: a new one, or the one of the run that `config.resume` goes on with.

        A run that was killed before it wrote anything starts afresh. Afterwards config.yaml holds `config`. Raises
        UserError, and leaves everything as it was, if there is a run already, or none to resume, or one with settings
        that differ in what a resumed run may not change, or if the folder cannot be written or is in use.
        """
        cls.check(config)
        folder = Path(config.output, config.name)
        made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
        try:
            run = cls(folder, _open_locked(folder))
            try:
                cls.check(config)  # another process may have been faster
                run._prepare(config)
            except UserError:
                run.close()
                _remove_leftovers(folder)
                raise
        except UserError:
            _remove_empty(made)
            raise
        return run

    def _prepare(self, config: Config) -> None:
        _remove_temporary(self.folder)
        for name in FOLDERS:
            _make_folder(self.folder / name)
        write_atomic(self.config_path, to_yaml(config))
        self._tracking = Tracking.start(config, self.folder)

    # --- writing -----------------------------------------------------------------------------------------------------

    def write_json(self, path: Path, value: Any) -> None:
        """Writes `value` to `path`, atomically; NaN and the infinities become null."""
        write_atomic(path, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl, in one write. `record` holds the number of its `iteration`."""
        written_as = _finite(record)
        line = (json.dumps(written_as, ensure_ascii=False) + "\n").encode()
        try:
            if self._metrics is None:
                # O_BINARY: else Windows writes a line's end as two bytes
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
                self._metrics = os.open(self.metrics_path, flags, 0o666)
            written = os.write(self._metrics, line)
        except OSError as error:
            raise UserError(f"Cannot write {self.metrics_path}: {reason(error)}.") from error
        if written < len(line):
            raise UserError(f"Cannot write {self.metrics_path}: the disk is full.")
        if self._history is not None:
            self._history.append(_in_short(written_as))
        if self._tracking:
            self._tracking.metrics(record)

    def write_samples(self, step: int, sheet: bytes) -> None:
        """The pictures [PNG] of an iteration, in samples/."""
        write_atomic(self.samples / f"iteration_{step:06d}.png", sheet)
        if self._tracking:
            self._tracking.picture("samples", sheet, step)

    def history(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl in short: evaluations as they are, of iterations number and reward alone.

        The file is read at the first call only: nobody else writes into the folder of an open run.
        """
        if self._history is None:
            self._history = [_in_short(record) for record in self.read_metrics()]
        return self._history

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; lines that are none, such as one that a killed process left half-written, are
        skipped."""
        return _read_records(self.metrics_path)[0]

    def truncate_metrics(self, iteration: int) -> int:
        """Drops the records after `iteration`, the one a resumed run starts from (-1: all), and all other lines.

        Returns how many lines were no records, besides a last one that is half-written.
        """
        records, bad = _read_records(self.metrics_path)
        kept = [record for record in records if record["iteration"] <= iteration]
        self._close_metrics()
        self._history = None
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_atomic(self.metrics_path, "".join(lines))
        return bad

    # --- closing -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Lets another process have the folder; may be called again."""
        self._close_metrics()
        if self._tracking:
            self._tracking.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            os.close(self._metrics)
            self._metrics = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _open_locked(folder: Path) -> int:
    """The descriptor of the locked lock file. The system lets go of it when the process ends, however it ends."""
    _make_folder(folder)
    path = folder / ".lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {reason(error)}.") from error
    try:
        if sys.platform == "win32":
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if sys.platform == "win32" or isinstance(error, BlockingIOError):
            os.close(handle)
            raise UserError(f"Another process is running in {folder}: wait for it or pass another --name.") from None
        # else a file system that knows no locks: better unguarded than not at all
    return handle


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make the folder {path}: {reason(error)}.") from error


def _check_same(folder: Path, config: Config) -> None:
    path = folder / "config.yaml"
    saved = load_yaml(path)
    changed = differences(saved, config)
    if changed:
        (name, (was, now)), *others = changed.items()
        more = f" (and {len(others)} more: {', '.join(other for other, _ in others[:3])})" if others else ""
        raise UserError(
            f"Cannot resume {folder}: {name} was {was!r} and is now {now!r}{more}; resume with the run's own"
            f" settings (--config {path}) or start a new run with another --name."
        )
    if config.iterations < saved.iterations:
        raise UserError(
            f"Cannot resume {folder}: iterations was {saved.iterations} and is now {config.iterations}; a"
            " resumed run may have more iterations, not fewer."
        )


def _check_files(folder: Path) -> None:
    """Raises UserError for what would stop the run after hours: a file that is none, a folder that takes no files."""
    _read_records(folder / "metrics.jsonl")
    for name in ("reward.png", "lora.safetensors", "summary.json"):
        require_ordinary(folder / name, "The file")
    for path in (best_checkpoint(folder / "checkpoints"), *checkpoints(folder / "checkpoints")):
        require_ordinary(path, "The checkpoint")
    for place in (folder, *(folder / name for name in FOLDERS)):
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"Cannot write into {place}: permission denied.")


def _read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a metrics.jsonl, and how many lines are none, besides a last one without its end.

    Raises UserError for what is no file.
    """
    if not os.path.lexists(path):
        return [], 0
    lines = read_bytes(path, "The file", MOST_METRICS).split(b"\n")
    records, bad = [], 0
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif line.strip() and number < len(lines):
            bad += 1
    return records, bad


def _in_short(record: dict[str, Any]) -> dict[str, Any]:
    return record if "held_out" in record else {name: record[name] for name in SHORT if name in record}


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, where it is one that a run may have written."""
    try:
        found = parse_json(line, "The line") if line.strip() else None
    except UserError:
        return None
    return found if isinstance(found, dict) and _is_iteration(found.get("iteration")) and _fits(found) else None


def _is_iteration(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_ITERATIONS


def _fits(record: Mapping[str, Any]) -> bool:
    """Whether what is read of a record again has the right form: numbers, and what evaluations say."""
    looked = "held_out" in record
    rows = [record.get("in_domain")] * looked + [row for name, row in record.items() if name.startswith("watch/")]
    if not all(isinstance(row, Mapping) and {"mean", "sem"} <= row.keys() and _numbers(row.values()) for row in rows):
        return False
    if not _numbers([record.get("reward"), record.get("held_out")]):
        return False
    interval = record.get("held_out_ci95")
    return not looked or (isinstance(interval, list) and len(interval) == 2 and _numbers([*interval, record.get("n")]))


def _numbers(values: Iterable[Any]) -> bool:
    """Finite ones; null stands for one that was not."""
    kinds = (int, float)
    return all(v is None or (isinstance(v, kinds) and not isinstance(v, bool) and abs(v) < 1e300) for v in values)


def _refuse_occupied(folder: Path) -> None:
    if os.path.exists(folder / "config.yaml"):
        raise UserError(f"There is a run in {folder} already: pass --resume to go on with it, or another --name.")
    if os.path.lexists(folder) and not _is_vacant(folder):
        raise UserError(f"{folder} exists and is not the folder of a run: pass another --name or --output.")


def _is_vacant(folder: Path) -> bool:
    """Whether there is nothing in `folder` but what an `open` that was killed may have left."""
    return os.path.isdir(folder) and all(
        _is_temporary(path) or path.name == ".lock" or (path.is_dir() and path.name in FOLDERS)
        for path in folder.rglob("*")
    )


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and TEMPORARY in path.suffixes


def _remove_temporary(folder: Path) -> None:
    for path in folder.rglob(".*"):
        if _is_temporary(path):
            path.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    if _is_vacant(folder):
        _remove_temporary(folder)
        (folder / ".lock").unlink(missing_ok=True)
        _remove_empty([folder / name for name in FOLDERS])


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
