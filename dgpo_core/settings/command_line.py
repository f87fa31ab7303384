"""Commands: their settings from arguments, their end as an exit code, and what was wrong in one sentence.

tyro reads the arguments and writes the help from the fields of the settings.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar, get_args, get_origin

import tyro

from dgpo_core.common.errors import Elsewhere, Interrupted, UserError, out_of_memory
from dgpo_core.common.reading import bounded, shown
from dgpo_core.common.suggest import suggest
from dgpo_core.common.terminal import talking
from dgpo_core.settings.config import RewardTerm, Switch
from dgpo_core.settings.schema import fixed_type, setting_types
from dgpo_core.settings.validation import check_ranges
from dgpo_core.settings.values import read_rewards, show_rewards

Settings = TypeVar("Settings")

_rewards = tyro.constructors.ConstructorRegistry()


@_rewards.primitive_rule
def _read_rewards(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[tuple[RewardTerm, ...]] | None:
    # tyro asks for the type of the default, tuple[RewardTerm, RewardTerm], where there are two
    if get_origin(info.type) is not tuple or {*get_args(info.type)} - {Ellipsis} != {RewardTerm}:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME[=WEIGHT],...",
        instance_from_str=lambda args: read_rewards(args[0], "--reward"),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [show_rewards(value)],
    )


INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def command(read: Callable[[], Settings], work: Callable[[Settings], object]) -> int:
    """A command: `work` on the settings that `read` gives; its exit code is 0, 2 after a user's mistake, 130 after
    Ctrl-C.

    What was wrong is told in one line, by one of the processes of the run. Printing never fails, see `talking`.
    """
    with talking():
        return _done(read, work)


def _done(read: Callable[[], Settings], work: Callable[[Settings], object]) -> int:
    """The exit code."""
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
    settings = read_arguments(kind, arguments_of(argv), prog, description, default)
    check_ranges(settings)
    return settings


def read_arguments(
    kind: type[Settings], argv: Sequence[str], prog: str, description: str | None, default: Settings | None
) -> Settings:
    """The same without looking at ranges, from arguments that `arguments_of` gave."""
    _refuse_unknown_and_repeated(kind, argv)
    argv = list(_with_switches(kind, argv))
    printed = io.StringIO()
    defaults: dict[str, Any] = {} if default is None else {"default": default}
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
                **defaults,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_sentence(printed.getvalue(), prog)) from None


def arguments_of(argv: Sequence[str] | None) -> list[str]:
    """The arguments, the process's by default, within bounds. Raises UserError for one that no text can hold."""
    found = bounded(list(sys.argv[1:] if argv is None else argv), "The command line")
    for argument in found:
        if "\0" in argument:
            raise UserError(f"The argument {shown(argument, 60)} holds a character that no text can hold (NUL).")
    return found


def named_options(argv: Sequence[str]) -> list[str]:
    """The names of the options that are given, such as "training.lr"."""
    return [token[2:].partition("=")[0].replace("-", "_") for token in argv if token.startswith("--")]


def _with_switches(kind: type, argv: Sequence[str]) -> Iterator[str]:
    """The arguments with a word behind each switch that may be left open: `--memory.offload` and `--memory.no_offload`
    are True and False."""
    switches = {name for name, hint in setting_types(kind).items() if hint == Switch}
    switches = {name.removeprefix("settings.") for name in switches}
    off = {"{}.no_{}".format(*name.split(".")): name for name in switches}
    for token, following in pairwise([*argv, "--"]):
        name = token[2:].replace("-", "_") if token.startswith("--") else ""
        if name in off:
            yield from (f"--{off[name]}", "False")
            continue
        yield token
        if name in switches and following.startswith("--"):
            yield "True"


def _refuse_unknown_and_repeated(kind: type, argv: Sequence[str]) -> None:
    known, lists = {"help"}, set()
    for name, hint in setting_types(kind).items():
        name = name.removeprefix("settings.")
        if get_origin(fixed_type(hint)) is tuple:
            lists.add(name)
        group, dot, leaf = name.rpartition(".")
        known |= {name, f"{group}{dot}no_{leaf}"} if fixed_type(hint) is bool else {name}
    named = named_options(argv)
    for name in named:
        if name not in known:
            raise UserError(f"There is no option --{shown(name, 60)}{suggest(name[:200], known, '--')}")
        if name in lists and named.count(name) > 1:  # the last would count, and the others be forgotten
            raise UserError(f"--{name} is given {named.count(name)} times: name all of it once, see --help.")


def _one_sentence(printed: str, prog: str) -> str:
    """The message that tyro prints: what stands between the line under its title and the next line."""
    lines = [line.strip() for line in printed.splitlines()]
    rules = [i for i, line in enumerate(lines) if line and not line.strip("-")] + [len(lines)]
    message = [line for line in lines[rules[0] + 1 : rules[min(1, len(rules) - 1)]] if line]
    text = " ".join(message).removesuffix(".") or f"The arguments cannot be read, see {prog} --help"
    return f"{text[:1].upper()}{text[1:]}."
