"""The rewards by name. A new one is one file and one line in `REWARDS`.

One that is not part of DGPO is named by an entry point of the group `dgpo.rewards` in a Python package, or as
path/to/file.py:Name.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.reading import kind_at, shown
from dgpo_core.rewards import weight_files
from dgpo_core.rewards.base import AUTOMATIC, WEIGHTS_FILE, Reward, need_packages
from dgpo_core.rewards.guard import check_prompts, described, guarded
from dgpo_core.rewards.published import ONE_FILE
from dgpo_core.settings.config import RewardTerm

REWARDS: dict[str, str] = {
    "shapes": "dgpo_core.rewards.shapes:Shapes",
    "shapes_graded": "dgpo_core.rewards.shapes:ShapesGraded",
    "similarity": "dgpo_core.rewards.similarity:Similarity",
    "clip_direction": "dgpo_core.rewards.clip_direction:ClipDirection",
    "clip_score": "dgpo_core.rewards.clip_score:ClipScore",
    "pickscore": "dgpo_core.rewards.pickscore:PickScore",
    "hpsv2": "dgpo_core.rewards.hpsv2:HpsV2",
    "image_reward": "dgpo_core.rewards.image_reward:ImageReward",
    "aesthetic": "dgpo_core.rewards.aesthetic:Aesthetic",
    "ocr": "dgpo_core.rewards.ocr.reward:Ocr",
    "geneval": "dgpo_core.rewards.geneval.reward:GenEval",
    "geneval_training": "dgpo_core.rewards.geneval.reward:GenEvalTraining",
    "jpeg_size": "dgpo_core.rewards.statistics:JpegSize",
    "edge_density": "dgpo_core.rewards.statistics:EdgeDensity",
    "entropy": "dgpo_core.rewards.statistics:Entropy",
    "brightness": "dgpo_core.rewards.statistics:Brightness",
    "saturation": "dgpo_core.rewards.statistics:Saturation",
    "group_diversity": "dgpo_core.rewards.statistics:GroupDiversity",
    "taste": "dgpo_core.rewards.taste.reward:TasteReward",
    "vlm_judge": "dgpo_core.rewards.vlm_judge:VlmJudge",
    "remote": "dgpo_core.rewards.remote:Remote",
}
"""Name -> "module:class". The module is imported when the reward is first used."""

GROUP = "dgpo.rewards"
"""The entry points of other packages: name -> module:class."""


def known_rewards() -> list[str]:
    """The names of all rewards that are built in or that an installed package brings."""
    return [*REWARDS, *sorted(set(_plugins()) - set(REWARDS))]


def make_reward(name: str, options: Mapping[str, Any] | None = None, device: str = "cpu") -> Reward:
    """The reward `name`, ready to score on `device`. Raises UserError for an unknown name or an unknown option."""
    cls, options = _bound(name, options)
    with guarded(f"Reward {name!r} cannot be made:"):
        made = cls(device=device, **options)
    if not isinstance(made, Reward):
        raise UserError(f"Reward {name!r} cannot be made: its class gives {type(made).__name__}, not a Reward.")
    return made


def require_reward(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Raises UserError where `make_reward` would for want of a package or of weights; loads and downloads nothing."""
    cls, options = _bound(name, options)
    with guarded(f"Reward {name!r} cannot say what it needs:"):
        need_packages(name, cls.packages)
        for needed, given in cls.sources(options):
            weight_files.require(needed, given, name)
        cls.require(options)


def check_cheaply(term: RewardTerm, prompts: Sequence[Prompt]) -> None:
    """Raises UserError for a prompt that the reward cannot judge, if it can say so without packages or weights."""
    cls, options = _bound(term.name, term.options)
    if not cls.packages and not cls.sources(options) and not cls.asks(options):
        check_prompts({term.name: make_reward(term.name, options)}, prompts)


def weights_of(terms: Sequence[RewardTerm]) -> dict[str, float]:
    """The weight of each reward, its sign turned where lower scores are better."""
    return {term.name: term.weight * (1 if _higher_is_better(term.name) else -1) for term in terms}


def is_file(name: str) -> bool:
    """Whether `name` is that of a class in a Python file, path/to/file.py:Name."""
    return name.rpartition(":")[0].endswith(".py")


def refuse_files(names: Sequence[str], where: str, instead: str) -> None:
    """Raises UserError for rewards in Python files: what others give away must not say which code runs here."""
    for name in names:
        if is_file(name):
            raise UserError(f"{where} names the Python file of a reward ({name}), which is not run: {instead}.")


def chosen_file(name: str, choice: str) -> dict[str, str]:
    """The options that the choice of a file makes; none for a file that is found without it, so that both are the same.

    Raises UserError for an unknown reward, one that takes no file, and another one's file.
    """
    if choice in ("", AUTOMATIC):
        return {}
    cls = reward_class(name)
    if any(choice in weights.names for weights in cls.weights):
        return {}
    others = next((f", which are {weights}" for weights in ONE_FILE if choice in weights.names), "")
    if others or not cls.file_option:
        raise UserError(f"Reward {name!r} does not take the weights {shown(choice)}{others}: choose {AUTOMATIC}.")
    return {WEIGHTS_FILE: choice.replace("\\", "/")}  # the same training, on whichever system it was chosen


def _with_file(name: str, cls: type[Reward], options: dict[str, Any]) -> dict[str, Any]:
    """The options with the path of the file that is chosen, if one is."""
    if WEIGHTS_FILE not in options or WEIGHTS_FILE in inspect.signature(cls).parameters:
        return options
    choice = options.pop(WEIGHTS_FILE)
    if not isinstance(choice, str):
        raise UserError(f"The option {WEIGHTS_FILE} of the reward {name!r} must be a file's name, not {choice!r}.")
    if not chosen_file(name, choice):
        return options
    if cls.file_option in options:
        raise UserError(f"The reward {name!r} has both {WEIGHTS_FILE} and {cls.file_option}: leave one of them out.")
    return {**options, cls.file_option: str(weight_files.named(choice))}


def _bound(name: str, options: Mapping[str, Any] | None) -> tuple[type[Reward], dict[str, Any]]:
    cls, options = reward_class(name), dict(options or {})
    options = _with_file(name, cls, options)
    for option in options.keys() & cls.retired.keys():
        raise UserError(f"Reward {name!r} has no option {option} any more: {cls.retired[option]}.")
    try:
        inspect.signature(cls).bind(device="cpu", **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"Reward {name!r} does not take these options: {error}.") from None
    return cls, options


def reward_class(name: str) -> type[Reward]:
    """The class of a reward. Raises UserError where there is none, or where it is no Reward."""
    if is_file(name):
        cls = _from_file(*name.rpartition(":")[::2])
    elif name in REWARDS:
        module, _, attribute = REWARDS[name].partition(":")
        cls = getattr(importlib.import_module(module), attribute)
    elif name in _plugins():
        cls = _from_plugin(name, _plugins()[name])
    else:
        near = difflib.get_close_matches(name, known_rewards(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known_rewards())}."
        raise UserError(f"Unknown reward {name!r}: {hint}")
    if not (isinstance(cls, type) and issubclass(cls, Reward)):
        raise UserError(f"Reward {name!r} is not a class that derives from dgpo_core.rewards.Reward.")
    return cls


def _higher_is_better(name: str) -> bool:
    """True also for scores that come from elsewhere, such as a person's."""
    known = is_file(name) or name in REWARDS or name in _plugins()
    with guarded(f"Reward {name!r} does not say whether higher is better:"):
        return bool(reward_class(name).higher_is_better) if known else True


def _plugins() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _from_plugin(name: str, entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except (Exception, SystemExit) as error:
        raise UserError(
            f"Reward {name!r}: {entry.value} cannot be imported ({described(error)}): update or remove the package that"
            " brings it."
        ) from error


@functools.cache
def _from_file(path: str, attribute: str) -> Any:
    """A class in a Python file, which is run once."""
    if kind_at(path, "The file") != "file":
        raise UserError(f"There is no file {path} with a reward in it.")
    name = f"dgpo_reward_{Path(path).stem}_{zlib.crc32(os.fsencode(os.path.abspath(path))):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec  # there is one, with a loader, for every .py
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, and whatever else looks up where a class is from, ask for it
    with guarded(f"The reward file {path} cannot be run:"):
        spec.loader.exec_module(module)
        if hasattr(module, attribute):
            return getattr(module, attribute)
    raise UserError(f"The reward file {path} has no class {attribute}.")
