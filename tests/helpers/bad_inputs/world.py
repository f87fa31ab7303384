"""Where a bad input is set up, and the arguments of a run that would work but for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from dgpo_core.runs.run import Run
from dgpo_core.settings.config import Config

GOOD = """{"prompt": "red", "include": []}
{"prompt": "blue", "include": []}
"""


@dataclass(frozen=True)
class World:
    """Where a bad input is set up: `folder` is the test's own, `output` is where the run would go."""

    folder: Path
    model: Path

    @property
    def output(self) -> Path:
        return self.folder / "runs"

    @property
    def base(self) -> list[str]:
        """Arguments of a run that would work, but for what the case adds."""
        return [
            *("--preset", "quickstart", "--output", str(self.output), "--name", "test"),
            *("--model.path", str(self.model), "--model.height", "32", "--model.width", "32", "--model.device", "cpu"),
            *("--data.prompts", self.file("good.jsonl", GOOD), "--data.held_out", ""),
        ]

    def file(self, name: str, content: str | bytes) -> str:
        """Writes a file beside the runs; its path."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def lora(self, **tensors: torch.Tensor) -> str:
        """A LoRA file of one module; its path."""
        path = self.folder / "lora.safetensors"
        save_file({f"transformer.{key}": tensor for key, tensor in tensors.items()}, path)
        return str(path)

    def run(self, **changes: object) -> Run:
        """A run of the same name that is there already."""
        saved = replace(Config(), name="test", output=str(self.output), **changes)
        with Run.open(saved) as run:
            return run


Case = Callable[[World], list[str]]
