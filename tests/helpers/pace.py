"""`python tests/helpers/pace.py`: what an iteration of the quickstart takes in ComfyUI's nodes, against headless.

Headless, the Training Loop, and the visual loop at one press an iteration, by turns on one machine that does nothing
else; previews and states are included, evaluations left out. An iteration is what a longer training takes more than a
short one, so that starting and loading do not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

from comfy_graphs import Graph, workflow
from comfy_server import REPO, ComfyServer, find_python

SHORT, LONG = 4, 16
FULL = {"LoadPolicy": {"rank": 32, "alpha": 64.0}, "Prompts": {"per_iteration": 8}}
FULL |= {"SamplerSettings": {"group_size": 16}, "TrainingSettings": {"lr": 1e-3}}
QUIET = ["--evaluation.every", "0", "--evaluation.final_images", "0", "--data.held_out", ""]


def headless(iterations: int, threads: int) -> None:
    """The command, in ComfyUI's own environment."""
    with tempfile.TemporaryDirectory() as folder:
        command = [find_python(), "-m", "dgpo_core.train", "--preset", "quickstart", "--output", folder, *QUIET]
        environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": str(threads)}
        subprocess.run(
            [*command, "--iterations", str(iterations)], check=True, capture_output=True, env=environment, cwd=folder
        )


def of_run(graph: Graph, run: str) -> Graph:
    """The graph as a run of its own."""
    next(node for node in graph.values() if node["class_type"] == "DGPO_LoadPolicy")["inputs"]["run"] = run
    return graph


def loop(comfy: ComfyServer, run: str, iterations: int) -> None:
    """The quickstart's Training Loop and the node that saves, without what is held out."""
    graph = of_run(workflow("quickstart", **FULL), run)
    graph = {key: node for key, node in graph.items() if key not in ("8", "9")}
    training = graph["6"]["inputs"]
    del training["held_out"]
    training["iterations"] = iterations
    comfy.run(graph, timeout=3600)


def presses(comfy: ComfyServer, run: str, iterations: int) -> None:
    """As many presses of Run on the visual loop, queued at once."""
    queued = [comfy.queue(of_run(workflow("visual_loop", **FULL), run)) for _ in range(iterations)]
    for prompt in queued:
        comfy.wait(prompt, timeout=3600)


def pace(train: Callable[[int], None]) -> float:
    """Seconds an iteration."""
    seconds = []
    for iterations in (SHORT, LONG):
        start = time.monotonic()
        train(iterations)
        seconds.append(time.monotonic() - start)
    return (seconds[1] - seconds[0]) / (LONG - SHORT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    ratios: dict[str, list[float]] = {"Training Loop": [], "visual loop": []}
    with ComfyServer(threads=asked.threads) as comfy:
        loop(comfy, "warm", 1)
        for pair in range(asked.pairs):
            alone = pace(lambda n: headless(n, asked.threads))
            nodes = pace(lambda n, pair=pair: loop(comfy, f"loop_{pair}_{n}", n))
            by_hand = pace(lambda n, pair=pair: presses(comfy, f"press_{pair}_{n}", n))
            print(f"headless {alone:.3f} s, Training Loop {nodes:.3f} s, visual loop {by_hand:.3f} s", flush=True)
            ratios["Training Loop"].append(nodes / alone)
            ratios["visual loop"].append(by_hand / alone)
    for name, found in ratios.items():
        told = ", ".join(f"{ratio:.2f}" for ratio in found)
        print(f"{name}: {statistics.median(found):.2f} times headless (median of {told})")


if __name__ == "__main__":
    main()
