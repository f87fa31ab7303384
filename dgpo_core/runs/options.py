"""The command line of a training: a preset, a mode, a settings file, then single settings, in that order."""

import argparse
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro

from dgpo_core.comfy.teach import load_training
from dgpo_core.common.errors import UserError
from dgpo_core.rewards import trust
from dgpo_core.settings import shipped
from dgpo_core.settings.command_line import arguments_of, named_options, read_arguments
from dgpo_core.settings.config import DEMO_REWARDS, HUMAN, NO_TRACKER, RATINGS, Config, RewardTerm
from dgpo_core.settings.presets import apply_mode, load_preset, preset_names
from dgpo_core.settings.validation import for_groups, validate
from dgpo_core.settings.values import from_dict
from dgpo_core.settings.yaml_file import load_yaml


@dataclass(frozen=True)
class CommandLine:
    """Train a diffusion model by Direct Group Preference Optimization."""

    preset: str = ""
    """The preset to start from."""
    mode: Literal["", "1", "2a", "2b"] = ""
    """1: roll-outs with CFG; 2a: CFG-free, frozen reference; 2b: CFG-free, moving reference; over preset and file."""
    config: str = ""
    """A YAML file of settings, such as a run's config.yaml, laid over the preset."""
    workflow: str = ""
    """A workflow of the ComfyUI nodes (.json): the settings of its training, instead of a preset."""
    trust_code: bool = False
    """Run the Python code (file.py:Name) that --config or the folder of a resumed run names, and ask its servers."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def parse_args(
    argv: Sequence[str] | None = None, default_preset: str = "quickstart", prog: str = "python -m dgpo_core.train"
) -> Config:
    """The validated settings of a training command; its run name is resolved.

    `default_preset` is taken where neither `--preset` nor `--config` is given; `--resume` without them takes the
    settings of the run that it resumes. Raises UserError for anything wrong with the arguments, and SystemExit(0) after
    printing `--help`.
    """
    argv = arguments_of(argv)
    chosen, base, implied = _start(argv, default_preset, prog)
    defaults = CommandLine(chosen.preset, chosen.mode, chosen.config, chosen.workflow, settings=base)
    description = (
        f"{CommandLine.__doc__}\n\nPresets: {', '.join(preset_names())}.\nPreset, --config, --mode and single"
        " settings are laid over each other in this order."
    )
    given = read_arguments(CommandLine, argv, prog, description, defaults)
    others = {term.name for term in given.settings.reward} - {RATINGS}
    if given.settings.groups and others and "reward" in named_options(argv):
        raise UserError("Ratings are the reward of --groups: leave --reward out, or watch that one with --watch.")
    config = for_groups(given.settings)
    if chosen.resumed and "track" not in named_options(argv):
        config = replace(config, track=NO_TRACKER)  # where data go is nothing that a folder decides
    if not given.trust_code:
        _check_trust(config, chosen, argv, prog)
    if implied:
        config = _without_the_demos_measure(config, named_options(argv))
    config = replace(config, name=config.name or (Path(chosen.config).stem if chosen.config else "run"))
    validate(config)
    return config


def _without_the_demos_measure(config: Config, named: Collection[str]) -> Config:
    """The quickstart's settings as they suit a model, prompts or a reward of the user's own, which are then measured.

    Its reward `shapes` knows the embedded model's pictures, and its held-out prompts go with its training prompts. What
    the user has `named` stays. On the embedded model `shapes` is still watched, beside a reward of one's own.
    """
    own_model = config.model.path not in shipped.MODELS
    own_prompts = config.data.prompts not in shipped.TRAINING or bool(config.data.text or (config.groups and own_model))
    own_world = own_prompts or own_model
    own_reward = not {term.name for term in config.reward} & {HUMAN, RATINGS, *DEMO_REWARDS}
    if own_prompts and not {"data.held_out", "data.held_out_text"} & set(named):
        config = replace(config, data=replace(config.data, held_out=""))
    if (own_world or own_reward) and "evaluation.reward" not in named:
        measure = RewardTerm(config.evaluation.reward)
        config = replace(config, evaluation=replace(config.evaluation, reward=""))
        if not own_world and "watch" not in named:
            config = replace(config, watch=(*config.watch, measure))
    return config


def _check_trust(config: Config, chosen: argparse.Namespace, argv: Sequence[str], prog: str) -> None:
    """Raises UserError for what a file may not decide without --trust-code."""
    if not (trust.code_of(config) or chosen.resumed):
        return
    typed = read_arguments(CommandLine, argv, prog, None, None).settings
    trust.check_code(config, typed, chosen.config)
    if chosen.resumed:
        trust.check_resumed(config, typed, chosen.config)


def _start(argv: Sequence[str], default_preset: str, prog: str) -> tuple[argparse.Namespace, Config, bool]:
    """What decides the defaults of all other options, those defaults, and whether nobody asked for them."""
    reader = _StartReader(prog=prog, add_help=False, allow_abbrev=False)
    for option in ("--preset", "--mode", "--config", "--workflow", "--name", "--output"):
        reader.add_argument(option, default="")
    reader.add_argument("--resume", action="store_true")
    chosen, _ = reader.parse_known_args(argv)
    saved = Path(chosen.output or Config().output, chosen.name or default_preset, "config.yaml")
    named = chosen.preset or chosen.config or chosen.workflow
    chosen.resumed = chosen.resume and not named and os.path.exists(saved)
    if chosen.resumed:
        chosen.config = str(saved)
    implied = not (chosen.preset or chosen.config or chosen.workflow)
    chosen.preset = default_preset if implied else chosen.preset
    base = load_preset(chosen.preset) if chosen.preset else Config()
    if chosen.workflow:
        base = from_dict(load_training(chosen.workflow, _family), base, chosen.workflow)
    if chosen.config:
        base = load_yaml(chosen.config, base)
    if chosen.resumed:
        base = replace(base, output=str(saved.parents[1]), name=saved.parent.name)  # it may have been moved
    if chosen.mode:
        base = apply_mode(base, chosen.mode)
    return chosen, base, implied


def _family(path: str) -> str:
    from dgpo_core.policy import family_of  # imported late: it takes seconds

    return family_of(path)


class _StartReader(argparse.ArgumentParser):
    """Reads the few options that must be known before tyro reads all."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}.")
