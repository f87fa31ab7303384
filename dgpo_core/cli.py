"""The command line: a preset, a mode, a settings file, then single settings, in that order.

tyro reads the arguments and writes the help from the fields of `config.py`; what it finds wrong becomes one sentence.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeVar

import tyro

from dgpo_core.comfy.workflow import load_workflow
from dgpo_core.common.errors import Elsewhere, Interrupted, UserError, out_of_memory
from dgpo_core.common.reading import bounded, shown
from dgpo_core.rewards import trust
from dgpo_core.settings import config_io
from dgpo_core.settings.config import DEMO_REWARDS, EMBEDDED, HUMAN, RATINGS, Config, RewardTerm

Settings = TypeVar("Settings")

_rewards = tyro.constructors.ConstructorRegistry()


@_rewards.primitive_rule
def _read_rewards(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    if info.type != tuple[RewardTerm, ...]:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME[=WEIGHT],...",
        instance_from_str=lambda args: config_io.read_rewards(args[0], "--reward"),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [config_io.show_rewards(value)],
    )


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


INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def command(read: Callable[[], Settings], work: Callable[[Settings], object]) -> int:
    """A command: `work` on the settings that `read` gives; its exit code is 0, 2 after a user's mistake, 130 after
    Ctrl-C.

    What was wrong is told in one line, by one of the processes of the run. What a terminal's encoding cannot show is
    written as escapes: printing never fails.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    settings = None
    try:
        settings = read()
        work(settings)
    except (Interrupted, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        told = error if isinstance(error, UserError) else out_of_memory(error)
        if told is None:
            raise
        # all processes read the same arguments
        if settings is not None or os.environ.get("RANK", "0") == "0":
            _tell(told)
        return 2
    return 0


def _tell(error: UserError) -> None:
    if not isinstance(error, Elsewhere):
        print(f"error: {shown(error, most=2000)}", file=sys.stderr)


def parse_args(
    argv: Sequence[str] | None = None, default_preset: str = "quickstart", prog: str = "python -m dgpo_core.train"
) -> Config:
    """The validated settings of a training command; its run name is resolved.

    `default_preset` is taken where neither `--preset` nor `--config` is given; `--resume` without them takes the
    settings of the run that it resumes. Raises UserError for anything wrong with the arguments, and SystemExit(0) after
    printing `--help`.
    """
    argv = _arguments(argv)
    chosen, base, implied = _start(argv, default_preset, prog)
    defaults = CommandLine(chosen.preset, chosen.mode, chosen.config, chosen.workflow, settings=base)
    description = (
        f"{CommandLine.__doc__}\n\nPresets: {', '.join(config_io.preset_names())}.\nPreset, --config, --mode and single"
        " settings are laid over each other in this order."
    )
    given = _parse(CommandLine, argv, prog, description, defaults)
    config = config_io.for_groups(given.settings)
    if not given.trust_code:
        _check_trust(config, chosen, argv, prog)
    if implied:
        config = _without_the_demos_measure(config, _named(argv))
    config = replace(config, name=config.name or (Path(chosen.config).stem if chosen.config else "run"))
    config_io.validate(config)
    return config


def _without_the_demos_measure(config: Config, named: Collection[str]) -> Config:
    """The quickstart's settings as they suit a model, prompts or a reward of the user's own, which are then measured.

    Its reward `shapes` knows the embedded model's pictures, and its held-out prompts go with its training prompts. What
    the user has `named` stays. On the embedded model `shapes` is still watched, beside a reward of one's own.
    """
    own_prompts = config.data.prompts != EMBEDDED or bool(config.data.text)
    own_world = own_prompts or config.model.path != EMBEDDED
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
    if trust.code_of(config):
        trust.check_code(config, _parse(CommandLine, argv, prog, None, None).settings, chosen.config)
    if chosen.resumed:
        trust.check_resumed(config, chosen.config)


def parse(
    kind: type[Settings],
    argv: Sequence[str] | None,
    prog: str,
    description: str | None = None,
    default: Settings | None = None,
) -> Settings:
    """An instance of the dataclass `kind` from command-line arguments (default: the process's).

    Raises UserError for whatever tyro finds wrong, in one sentence, and for a number out of its range; SystemExit(0)
    after printing `--help`.
    """
    settings = _parse(kind, _arguments(argv), prog, description, default)
    config_io.check_ranges(settings)
    return settings


def _parse(
    kind: type[Settings], argv: Sequence[str], prog: str, description: str | None, default: Settings | None
) -> Settings:
    _refuse_unknown(kind, argv)
    printed = io.StringIO()
    arguments = {} if default is None else {"default": default}
    try:
        with contextlib.ExitStack() as redirections:
            redirections.enter_context(contextlib.redirect_stderr(printed))
            if not {"-h", "--help"} & set(argv):
                # tyro frames and colours its errors as fits the terminal that stdout is: a buffer gets plain text
                redirections.enter_context(contextlib.redirect_stdout(io.StringIO()))
            return tyro.cli(
                kind,
                prog=prog,
                description=description,
                args=argv,
                use_underscores=True,
                registry=_rewards,
                **arguments,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_sentence(printed.getvalue(), prog)) from None


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
    base = config_io.load_preset(chosen.preset) if chosen.preset else Config()
    if chosen.workflow:
        base = config_io.from_dict(load_workflow(chosen.workflow), base, chosen.workflow)
    if chosen.config:
        base = config_io.load_yaml(chosen.config, base)
    if chosen.resumed:
        base = replace(base, output=str(saved.parents[1]), name=saved.parent.name)  # it may have been moved
    if chosen.mode:
        base = config_io.apply_mode(base, chosen.mode)
    return chosen, base, implied


class _StartReader(argparse.ArgumentParser):
    """Reads the few options that must be known before tyro reads all."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}.")


def _arguments(argv: Sequence[str] | None) -> list[str]:
    found = bounded(list(sys.argv[1:] if argv is None else argv), "The command line")
    for argument in found:
        if "\0" in argument:
            raise UserError(f"The argument {shown(argument, 60)} holds a character that no text can hold (NUL).")
    return found


def _named(argv: Sequence[str]) -> list[str]:
    """The names of the options that are given, such as "training.lr"."""
    return [token[2:].partition("=")[0].replace("-", "_") for token in argv if token.startswith("--")]


def _refuse_unknown(kind: type, argv: Sequence[str]) -> None:
    known = {"help"}
    for name, hint in config_io.setting_types(kind).items():
        name = name.removeprefix("settings.")
        group, dot, leaf = name.rpartition(".")
        known |= {name, f"{group}{dot}no_{leaf}"} if hint is bool else {name}
    for name in _named(argv):
        if name not in known:
            raise UserError(f"There is no option --{shown(name, 60)}{config_io.suggest(name[:200], known, '--')}")


def _one_sentence(printed: str, prog: str) -> str:
    """The message that tyro prints: what stands between the line under its title and the next line."""
    lines = [line.strip() for line in printed.splitlines()]
    rules = [i for i, line in enumerate(lines) if line and not line.strip("-")] + [len(lines)]
    message = [line for line in lines[rules[0] + 1 : rules[min(1, len(rules) - 1)]] if line]
    text = " ".join(message).removesuffix(".") or f"The arguments cannot be read, see {prog} --help"
    return f"{text[:1].upper()}{text[1:]}."
