"""What a file may decide, by whose it is.

What is shared (a workflow) names rewards and sets the options that a reward declares `shareable`: no code, no address,
no path, no variable. What the machine's own user gives with `--config` sets every option. Python code (file.py:Name)
runs where the user names it in the same command; from a file, and any more from the folder of a run that is resumed,
with `--trust-code` only.
"""

import inspect
from collections.abc import Iterator, Sequence

from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown
from dgpo_core.rewards.base import Reward
from dgpo_core.rewards.network import endpoints
from dgpo_core.rewards.network.web import ServerReward
from dgpo_core.rewards.registry import is_file, refuse_files, reward_class
from dgpo_core.settings.config import PEOPLE, Config, RewardTerm


def check_shared(terms: Sequence[RewardTerm], where: str) -> None:
    """Raises UserError where the rewards of a shared file decide what is not theirs. where: "The workflow a.json"."""
    refuse_files([term.name for term in terms], where, "give it with --reward to train headless")
    for term in terms:
        for option in private_options(term):
            raise UserError(
                f"{where} sets the option {shown(option, 60)} of the reward {term.name}, which only you can decide on"
                f" this machine: {_instead(reward_class(term.name), option)}"
            )


def private_options(term: RewardTerm) -> list[str]:
    """The options of a term that only the machine's own user may set, and that its reward takes."""
    if term.name in PEOPLE or not term.options:
        return []
    cls = reward_class(term.name)
    return [option for option in term.options if option not in cls.shareable and _takes(cls, option)]


def _takes(cls: type[Reward], option: str) -> bool:
    """Whether the constructor takes the option; what it does not take is told when the reward is made."""
    parameters = inspect.signature(cls).parameters
    return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _instead(cls: type[Reward], option: str) -> str:
    """What to do instead of setting an option in a shared file, as the end of a sentence."""
    if issubclass(cls, ServerReward) and option in ("url", "model", "request", cls.key_option):
        return f'use {{"endpoint": "my_server"}} instead, and {endpoints.advice()}'
    own = next((weights for weights in cls.weights if weights.option == option), None)
    if own:
        return f"leave it out, and put your copy into the folder of reward models as {own.names[0]}."
    return "leave it out, or set it in a YAML file of your own (--config) to train headless."


# --- what a command brings -------------------------------------------------------------------------------------------


def code_of(config: Config) -> list[str]:
    """The classes in Python files that a run of these settings runs, as file.py:Name."""
    names = [*(term.name for term in (*config.reward, *config.watch)), config.evaluation.reward]
    return [name for name in dict.fromkeys(names) if is_file(name)]


def check_code(config: Config, typed: Config, source: str) -> None:
    """Raises UserError for code that a file brings. typed: the settings of the command line alone."""
    for name in code_of(config):
        if name not in code_of(typed):
            raise UserError(
                f"{source} runs the Python code {shown(name)}, which can do whatever you can: read it, then pass"
                " --trust-code, or name it yourself with --reward."
            )


def check_resumed(config: Config, typed: Config, folder: str) -> None:
    """Raises UserError where the settings in a run's folder decide what only the machine's own user may.

    typed: the settings of the command line alone; what it names again (taste=FILE) is the user's.
    """
    own = (*typed.reward, *typed.watch)
    for term in (*config.reward, *config.watch):
        for option in () if is_file(term.name) or term in own else private_options(term):
            raise UserError(
                f"{folder} sets the option {shown(option, 60)} of the reward {shown(term.name)}: if you trust the"
                " folder, pass --trust-code, or give the settings file of your own as --config again."
            )


def uses(config: Config) -> Iterator[str]:
    """What is told before it is used: code of a file, and servers that see images and prompts."""
    for name in code_of(config):
        yield f"Code that is run: {shown(name)}"
    for term in (*config.reward, *config.watch):
        server = "" if term.name in PEOPLE or is_file(term.name) else reward_class(term.name).asks(term.options)
        if server:
            yield f"Server that is asked: {server} (reward {term.name})"
