"""`python -m dgpo_core.fit`: does a training fit on a card, and how long does it take?

The code of an iteration runs on tensors without storage, so neither weights nor a GPU are needed: every byte that the
iteration holds is counted, and every operation. Seconds come from a card's published figures and from assumptions of
what is reached of them. A reward's own network is not counted.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from dgpo_core.benchmark.cards import find_card
from dgpo_core.benchmark.presets import PRESETS
from dgpo_core.benchmark.report import Report, table, verdict
from dgpo_core.common.errors import UserError
from dgpo_core.common.files import write_atomic
from dgpo_core.settings.command_line import arguments_of, command, read_arguments
from dgpo_core.settings.config import EMBEDDED, Config, NotNegative
from dgpo_core.settings.presets import load_preset, preset_names
from dgpo_core.settings.validation import check_ranges, validate

PROG = "python -m dgpo_core.fit"


@dataclass(frozen=True)
class FitConfig:
    """What to count. Any setting of a training can be given as well, such as --rollout.batch 2."""

    preset: str = ""
    """The preset whose settings are counted; empty: the one of --random, else quickstart."""
    model: str = ""
    """Another model than the preset's: a diffusers folder or a .safetensors file; its weights are not read."""
    random: str = ""
    """A published architecture instead: sd15, sd21, sd35m, sdxl, flux, kontext, zimage, qwenimage, qwen-image-edit,
    chroma, flux2-klein, sana, hidream, wan or wan-14b."""
    vram: NotNegative = 0.0
    """Memory of the card in GB (of 2**30 bytes); 0 takes that of --card."""
    card: str = ""
    """The card, such as "RTX 4090": how long it takes there; empty counts memory and operations alone."""
    json: Path | None = None
    """Write the numbers to this file."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def read(argv: Sequence[str] | None = None) -> FitConfig:
    """What to count: the preset's settings with those that are given laid over them.

    Raises UserError for whatever cannot be, before anything is built, and SystemExit(0) after printing `--help`.
    """
    argv = arguments_of(argv)
    description = f"{__doc__}\n\nPresets: {', '.join(preset_names())}."
    first = read_arguments(FitConfig, argv, PROG, description, None)
    if first.model and first.random:
        raise UserError("--model and --random each name the model that is counted: give one of them.")
    if first.random and first.random not in PRESETS:
        raise UserError(f"There is no random model {first.random}; known: {', '.join(PRESETS)}.")
    if first.card:
        find_card(first.card)
    base = load_preset(first.preset or PRESETS.get(first.random, "quickstart"), Config())
    if not base.data.prompts:  # the embedded ones stand in for prompts that are not written yet
        base = replace(base, data=replace(base.data, prompts=EMBEDDED))
    given = read_arguments(FitConfig, argv, PROG, description, FitConfig(settings=base))
    check_ranges(given)
    config = given.settings
    if given.model:
        config = replace(config, model=replace(config.model, path=given.model))
    validate(config)
    return replace(given, settings=config)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command(lambda: read(argv), _fit)


def _fit(options: FitConfig) -> None:
    card = find_card(options.card) if options.card else None
    report = Report.of(options.settings, options.random, card, options.vram)
    print(table(report))
    print(verdict(report))
    if options.json:
        write_atomic(options.json, json.dumps(report.as_json(), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
