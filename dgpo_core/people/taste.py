"""`python -m dgpo_core.people.taste FILES... --out taste.safetensors`: a reward made of what people said.

FILES are preference files, such as a run's asked/answers.jsonl, and folders of rated pictures.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dgpo_core.common.distributed import World
from dgpo_core.common.errors import UserError
from dgpo_core.common.files import require_writable
from dgpo_core.common.reading import shown
from dgpo_core.people.judged import judged, read_answers
from dgpo_core.rewards.taste.features import features
from dgpo_core.rewards.taste.model import fit, summary
from dgpo_core.settings.command_line import command, parse

PROGRAM = "python -m dgpo_core.people.taste"


@dataclass(frozen=True)
class TasteConfig:
    """Fit a taste, a small model of which pictures somebody finds better, and save it for the reward taste=FILE."""

    sources: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Preference files (.jsonl) and folders of rated pictures."""
    out: Path = Path("taste.safetensors")
    """The file to write, below 2 MB."""
    features: Literal["auto", "clip", "built-in"] = "auto"
    """What it looks at: CLIP (as the reward clip_score), or what is built in; 'auto' takes CLIP where it is here."""
    clip: str = ""
    """Folder or hub id of another CLIP."""
    device: str = "auto"
    """Where CLIP computes: cpu, cuda, cuda:1, mps; 'auto' takes the first accelerator there is."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    return command(lambda: parse(TasteConfig, argv, PROGRAM, __doc__), _fit)


def _fit(options: TasteConfig) -> None:
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, not be {shown(options.out)}.")
    require_writable(options.out)
    gallery = read_answers(options.sources)
    for note in gallery.notes:
        print(shown(note, 2000))
    seen = features(options.features, options.clip)
    with seen.on(World(options.device).device):
        taste = fit(judged(gallery.groups, seen), seen)
    taste.save(options.out)
    print(f"{shown(options.out, 1000)}: {summary(taste)}")


if __name__ == "__main__":
    sys.exit(main())
