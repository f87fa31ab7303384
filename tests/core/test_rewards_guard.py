"""Whatever a reward plug-in does, anywhere: one sentence with its name, exit code 2, and the checkpoint is kept."""

from pathlib import Path

import pytest
from engine import write_quick

from dgpo_core.train import main

CLASS = """
import sys, threading
import torch
from dgpo_core.rewards import Reward

class Odd(Reward):
    calls = 0

    def score(self, images, prompts, metadata):
        Odd.calls += 1
        return images.mean((1, 2, 3))
"""
OVERLAPS = """
    def overlaps(self, device, group_size):
        return True
"""
RAISED = ["raise ValueError('odd')", "sys.exit(0)", "raise SystemExit", "1 / 0", "raise RecursionError"]
BROKEN_TEXT = """
class Mute(Exception):
    def __str__(self):
        raise TypeError

"""


def method(name: str, arguments: str, body: str) -> str:
    return f"{CLASS}\n    def {name}(self{arguments}):\n        {body}\n"


def late(body: str) -> str:
    """`score` that does something from its third call on, when the first iteration is done."""
    return method("score", ", images, prompts, metadata", f"Odd.calls += 1\n        if Odd.calls > 3: {body}") + (
        "        return images.mean((1, 2, 3))\n"
    )


def cases() -> dict[str, tuple[str, str]]:
    """Source of the file, and what is told."""
    found: dict[str, tuple[str, str]] = {
        "nothing in it": ("", "has no class Odd"),
        "a syntax error": ("class Odd(", "SyntaxError"),
        "no text": ("\0", "cannot be run"),
        "another class": ("class Odd: pass", "is not a class that derives from"),
        "an instance": (f"{CLASS}\nOdd = Odd()", "is not a class that derives from"),
        "no score": ("from dgpo_core.rewards import Reward\nclass Odd(Reward): pass", "abstract"),
        "another object": (f"{CLASS}\n    def __new__(cls, *a, **k): return 3\n", "gives int, not a Reward"),
        "a lookup that fails": ("def __getattr__(name): raise ValueError('odd')", "cannot be run"),
        "a package that is missing": ("import no_such_package", "ModuleNotFoundError: No module named"),
        "an error without a text": (
            BROKEN_TEXT + CLASS + "\n    def check(self, prompts): raise Mute\n",
            "Mute: no message",
        ),
        "lower is better, or not": (f"{CLASS}\n    higher_is_better = torch.ones(2)\n", "whether higher is better"),
        "overlaps of two minds": (
            method("overlaps", ", device, group_size", "return torch.ones(2)"),
            "failed in overlaps()",
        ),
        "scores of another shape": (late("return images"), "returned scores of shape"),
        "one score too few": (late("return images.mean((1, 2, 3))[1:]"), "returned scores of shape"),
        "a number": (late("return 1.0"), "returned float"),
        "nothing at all": (late("return None"), "returned NoneType"),
        "an array": (late("return images.mean((1, 2, 3)).numpy()"), "returned ndarray"),
        "complex numbers": (late("return images.mean((1, 2, 3)) * 1j"), "returned complex numbers"),
        "scores without data": (late("return torch.empty(len(images), device='meta')"), "cannot be read"),
        "no number": (late("return images.mean((1, 2, 3)) * float('nan')"), "returned nan for sample 0"),
        "infinity": (late("return images.mean((1, 2, 3)) / 0"), "returned inf for sample 0"),
    }
    for i, raised in enumerate(RAISED):
        found |= {
            f"import {i}": (f"import sys\n{raised}", "The reward file odd.py cannot be run:"),
            f"init {i}": (method("__init__", ", device='cpu'", raised), "cannot be made:"),
            f"check {i}": (method("check", ", prompts", raised), "failed in check() with"),
            f"overlaps {i}": (method("overlaps", ", device, group_size", raised), "failed in overlaps() with"),
            f"score {i}": (late(raised), "failed on sample"),
            f"score in a thread {i}": (late(raised) + OVERLAPS, "failed on sample"),
            f"close {i}": (method("close", "", raised), "failed in close() with"),
        }
    return found


CASES = cases()


@pytest.mark.slow
@pytest.mark.parametrize(("source", "says"), CASES.values(), ids=CASES)
def test_a_plug_in_that_misbehaves_is_told(
    source: str,
    says: str,
    sd3_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = {"iterations": 3, "evaluation": {"every": 0, "final_images": 0}, "checkpoint": {"every": 100}}
    argv = [*write_quick(tmp_path, sd3_folder, **changes, reward=f"{tmp_path}/odd.py:Odd"), "--trust-code"]
    (tmp_path / "odd.py").write_text(source)
    assert main(argv) == 2
    told = capsys.readouterr().err
    (sentence,) = [line for line in told.splitlines() if "error" in line and not line.startswith("test")]
    assert says.replace("odd.py", f"{tmp_path}/odd.py") in sentence
    assert "odd.py" in sentence
    assert "Traceback" not in told
    started = (tmp_path / "runs/test").exists()
    assert started == any((tmp_path / "runs/test/checkpoints").glob("step_*"))


def test_the_users_own_ctrl_c_in_a_plug_in_is_ctrl_c(
    sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = write_quick(tmp_path, sd3_folder, reward=f"{tmp_path}/odd.py:Odd", evaluation={"final_images": 0})
    argv = [*settings, "--trust-code"]
    (tmp_path / "odd.py").write_text(late("raise KeyboardInterrupt"))
    assert main(argv) == 130
