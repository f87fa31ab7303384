"""`python -m dgpo_core.bench --suite`: all that should be seen on a new GPU, in minutes and without a network.

Each case is a process of its own, so that one that fails takes nothing from the others and memory is counted from
nothing. What `python -m dgpo_core.fit` counts for the same settings is made beside it, on the processor.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgpo_core.benchmark.presets import PRESETS
from dgpo_core.common.files import write_atomic
from dgpo_core.settings.presets import preset_names

SECONDS = 480.0
"""Of the whole suite: what has not begun by then is left out."""
LONGEST = 150.0
"""Seconds of one case."""


@dataclass(frozen=True)
class Case:
    """One model of real size with random weights, timed and counted under its preset for an evening where it has one.

    images: of its one group, and in one forward. kept: how the base's layers are kept (`model.quantize`).
    """

    model: str
    images: int
    checkpointing: bool
    kept: str = "none"
    compiled: bool = False
    blocks: bool = False

    @property
    def name(self) -> str:
        """For the table."""
        how = [f"{self.model}, {self.images} images", "checkpointing" if self.checkpointing else "without"]
        how += [self.kept] * (self.kept != "none") + ["compiled"] * self.compiled + ["blocks in turn"] * self.blocks
        return ", ".join(how)

    @property
    def preset(self) -> str:
        """Whose settings it has besides."""
        return self.model if self.model in preset_names() else PRESETS.get(self.model, "quickstart")

    def timed(self, device: str, json_file: Path) -> list[str]:
        """The command that times it."""
        n, recompute = str(self.images), "on" if self.checkpointing else "off"
        extra = ["--compile"] * self.compiled + ["--offload_blocks"] * self.blocks
        return [
            *_module("bench"), "--random", self.model, "--preset", self.preset, "--groups", "1",
            "--group_size", str(max(2, self.images)), "--batch", n, "--micro_batch", n, "--checkpointing", recompute,
            "--quantize", self.kept, *extra, "--iterations", "2", "--no_scaling", "--device", device,
            "--json", str(json_file),
        ]  # fmt: skip

    def counted(self, json_file: Path) -> list[str]:
        """The command that counts it."""
        n = str(self.images)
        recompute = "--memory.gradient_checkpointing" if self.checkpointing else "--memory.no_gradient_checkpointing"
        extra = ["--memory.compile"] * self.compiled + ["--memory.offload_blocks"] * self.blocks
        return [
            *_module("fit"), "--random", self.model, "--preset", self.preset, "--data.groups_per_iteration", "1",
            "--rollout.group_size", str(max(2, self.images)), "--rollout.batch", n, "--training.micro_batch", n,
            "--evaluation.batch", n, "--model.quantize", self.kept, recompute, *extra, "--json", str(json_file),
        ]  # fmt: skip


CASES = (
    Case("sd15", 8, False),
    Case("sdxl", 4, False),
    Case("sd35m", 4, False),
    Case("zimage", 4, True),
    Case("flux", 2, True),
    Case("sdxl", 4, True),
    Case("sdxl", 4, True, compiled=True),
    Case("flux", 2, True, kept="fp8"),
    Case("flux", 2, True, kept="int8"),
    Case("flux", 2, True, kept="nf4"),
    Case("flux", 2, True, blocks=True),
    Case("sd35m", 4, True),
    Case("flux", 2, False),
    Case("zimage", 4, True, kept="fp8"),
)
"""Sorted by what should be known first."""


def run(device: str, cases: Sequence[Case] = CASES, quickstart: Sequence[str] = ()) -> dict[str, Any]:
    """All cases and the quickstart, which gets these settings besides; what each said, or how it failed."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        counting = [
            subprocess.Popen(case.counted(place / f"fit{i}.json"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for i, case in enumerate(cases)
        ]
        try:
            found: dict[str, Any] = {"quickstart": _quickstart(device, place, quickstart), "cases": {}}
            for i, case in enumerate(cases):
                if time.monotonic() - start > SECONDS:
                    found["cases"][case.name] = {"failed": "left out: the time was up"}
                    continue
                found["cases"][case.name] = _said(case.timed(device, place / f"{i}.json"), place / f"{i}.json")
            for i, (case, process) in enumerate(zip(cases, counting, strict=True)):
                left = max(1.0, SECONDS + LONGEST - (time.monotonic() - start))
                found["cases"][case.name] |= {"fit": _counted(process, place / f"fit{i}.json", left)}
        finally:
            for process in counting:
                process.kill()
    return found | {"seconds": time.monotonic() - start}


def table(found: Mapping[str, Any]) -> str:
    """What was found, in Markdown."""
    quick = found["quickstart"]
    success = quick.get("failed") or (
        f"held-out success {quick['base']['mean']:.3f} to {quick['adapter']['mean']:.3f} in {quick['seconds']:.0f} s"
    )
    lines = [f"Quickstart: {success}.", "", "| case | iteration | rollout | update | peak | counted | off |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, case in found["cases"].items():
        if "failed" in case:
            lines.append(f"| {name} | {case['failed']} | | | | | |")
            continue
        phases, peak, fit = case["phases"], case["peak_memory_gib"], case["fit"]
        counted, off = (f"{fit:.1f} GiB", f"{fit / peak - 1:+.0%}") if fit else ("not counted", "")
        lines.append(
            f"| {name} | {case['seconds_per_iteration']:.2f} s | {phases['rollout']:.2f} s | {phases['update']:.2f} s"
            f" | {peak:.1f} GiB | {counted} | {off} |"
        )
    return "\n".join(lines)


def _module(name: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", f"dgpo_core.{name}"]


def _quickstart(device: str, place: Path, settings: Sequence[str]) -> dict[str, Any]:
    """The quickstart from start to end, as a new user runs it: its summary."""
    command = [*_module("train"), "--preset", "quickstart", "--model.device", device, "--output", str(place), *settings]
    return _said(command, place / "quickstart" / "summary.json")


def _said(command: Sequence[str], json_file: Path) -> dict[str, Any]:
    """What a command wrote; {"failed": its last line} where it failed or took too long."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {LONGEST:.0f} s"}
    if ran.returncode or not json_file.is_file():
        return {"failed": (ran.stderr.strip() or "no result").splitlines()[-1]}
    found: dict[str, Any] = json.loads(json_file.read_text(encoding="utf-8"))
    return found


def _counted(process: subprocess.Popen[bytes], json_file: Path, left: float) -> float | None:
    """GiB at the peak of an iteration, without the evaluation; None where the count was not made in time."""
    try:
        process.wait(left)
        phases = json.loads(json_file.read_text(encoding="utf-8"))["phases"]
    except (subprocess.TimeoutExpired, OSError, ValueError):
        return None
    return max(phase["bytes"] for name, phase in phases.items() if name != "evaluation") / 2**30


def report(device: str, json_file: Path | None) -> str:
    """Runs everything; the table. json_file: where the numbers go, too."""
    if json_file:
        write_atomic(json_file, "{}\n")  # what cannot be written is told before the minutes, not after them
    found = run(device)
    if json_file:
        write_atomic(json_file, json.dumps(found, indent=2) + "\n")
    return table(found)
