"""`python -m dgpo_core.evaluate --lora FILE ...`: measure adapters against their base again, on the same noise.

A file that DGPO wrote says what it was measured by: on the embedded model it is enough by itself. It may be somebody
else's, so that nothing but numbers and the names of what ships with DGPO is taken from it; all else comes from options
or from settings of your own. What will be run is printed before it runs.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from dgpo_core.common.distributed import World
from dgpo_core.common.errors import UserError
from dgpo_core.common.files import require_writable, write_atomic
from dgpo_core.common.group import Group
from dgpo_core.common.pictures import MOST_EACH
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.reading import shown
from dgpo_core.common.terminal import say
from dgpo_core.evaluation.by_tag import tags_of
from dgpo_core.evaluation.held_out import HeldOut, evaluation_set
from dgpo_core.evaluation.report import Column, Table, markdown, picture
from dgpo_core.evaluation.scores import Evaluation, evaluation_weights
from dgpo_core.policy import AdapterName
from dgpo_core.policy.lora import file as lora_file
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.rewards import REWARDS, Reward, guard, make_reward, refuse_files, reward_class, trust
from dgpo_core.rewards.network.web import ServerReward
from dgpo_core.runs import assemble, origin
from dgpo_core.runs.origin import Origin
from dgpo_core.settings import shipped
from dgpo_core.settings.command_line import command, parse
from dgpo_core.settings.config import EMBEDDED, Config, DataConfig, LoraConfig, Range, RewardTerm
from dgpo_core.settings.validation import validate
from dgpo_core.settings.values import read_rewards
from dgpo_core.settings.yaml_file import load_yaml

SHOWN_PROMPTS = 6  # rows of the picture
BASE = "base"  # what the model without an adapter is called


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure."""

    lora: tuple[Path, ...] = ()
    """The adapters, one or more .safetensors files."""
    json: Path | None = None
    """Write the result to this file, in the form of a run's summary.json, with the whole table."""
    report: Path | None = None
    """Write report.md and report.png, the same prompts and seeds side by side, into this folder."""
    images: Annotated[int, Range(2, 1_000_000)] = 512
    """Images of the base and of each adapter, at least 2."""
    config: Path | None = None
    """Settings of your own to measure by instead of the file's word, such as the config.yaml of a run."""
    model: str = ""
    """The base model; empty is that of --config, or the embedded one where the file names it."""
    prompts: str = ""
    """A .txt or .jsonl file of prompts; empty is as --config says, or the embedded held-out prompts likewise."""
    reward: tuple[str, ...] = ()
    """The rewards to measure, one or more; none is as --config says, or the built-in ones that the files name."""
    steps: Annotated[int, Range(0, 1000)] = 0
    """Solver steps; 0 is as --config or the file says."""
    cfg: Annotated[float, Range(0, 100)] = 0.0
    """Guidance scale; 0 is as --config or the file says, 1 is no guidance."""
    device: str = "auto"
    """Where to run: cpu, cuda, cuda:1, mps; 'auto' takes the first accelerator there is."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA file. origin: what it says of its making; None where DGPO did not write it."""

    label: str
    file: lora_file.LoraFile
    origin: Origin | None

    @property
    def step(self) -> int:
        return self.origin.step if self.origin else 0

    @property
    def settings(self) -> LoraConfig:
        """The branches that it goes into: its own, at scale 1."""
        return LoraConfig(self.file.rank, float(self.file.rank), init=str(self.file.path))

    def fits_as(self, other: "Adapter") -> bool:
        """Whether it can take the place of the other one on the same loaded model."""
        return self.file.rank == other.file.rank and self.file.modules == other.file.modules


@dataclass(frozen=True)
class Written:
    """What a file that DGPO wrote says of its making."""

    path: Path
    origin: Origin


def written(adapters: Sequence[Adapter]) -> list[Written]:
    """Of those that DGPO wrote."""
    return [Written(adapter.file.path, adapter.origin) for adapter in adapters if adapter.origin]


@dataclass(frozen=True)
class Plan:
    """What will be run. sources: for the model, the prompts and the rewards, where each was named."""

    config: Config
    columns: Sequence[Column]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        config, e = self.config, self.config.evaluation
        prompts = "in the settings" if config.data.held_out_text else config.data.held_out or "in the settings"
        rewards = ", ".join(column.name for column in self.columns)
        fast = f" with the few-step LoRA {config.model.few_step_lora}" if config.model.few_step_lora else ""
        told = {"model": f"{config.model.path}{fast}", "prompts": prompts, "rewards": rewards}
        drawn = f"  drawn    {e.solver or config.rollout.solver}, {e.steps} steps, guidance {e.cfg:g}"
        lines = [f"  {what:8} {shown(value)} (from {shown(self.sources[what])})" for what, value in told.items()]
        return "\n".join(["This will be run:", *lines, shown(drawn), *trust.uses(self._measuring)])

    @property
    def _measuring(self) -> Config:
        """Settings whose only rewards are those that are measured."""
        names = dict.fromkeys(name for column in self.columns for name in column.weights)
        terms = tuple(RewardTerm(name, options=self.options.get(name, {})) for name in names)
        return replace(self.config, reward=terms, watch=(), evaluation=replace(self.config.evaluation, reward=""))


# --- what is asked ---------------------------------------------------------------------------------------------------


def read_adapters(options: EvaluateConfig) -> list[Adapter]:
    """The files, with a name for each. Raises UserError for one that is missing, no LoRA, or of another base."""
    if not options.lora:
        raise UserError("There is no LoRA to measure: give one or more files with --lora FILE.")
    files = [lora_file.read(path) for path in options.lora]
    found = [
        Adapter(label, file, origin.read(file.path, file.metadata))
        for label, file in zip(_labels(options.lora), files, strict=True)
    ]
    known = written(found)
    if not known and not options.config and not (options.model and options.prompts and options.reward):
        raise UserError(
            f"{shown(found[0].file.path)} was not written by DGPO, so its metadata do not say how to measure it: give"
            " --model, --prompts and --reward."
        )
    for other in known[1:]:
        first, here = known[0].origin.base, other.origin.base
        if known[0].origin.few_step_lora != other.origin.few_step_lora and not options.config:
            raise UserError(
                f"{shown(known[0].path)} and {shown(other.path)} were not both trained on a base with the same few-step"
                " LoRA merged into it: measure them one by one, or give settings with --config."
            )
        if first != here and not options.model:
            raise UserError(
                f"{shown(other.path)} was trained on {shown(here)}, {shown(known[0].path)} on"
                f" {shown(first)}: compare adapters of one base model, or give --model."
            )
    return found


def _labels(paths: Sequence[Path]) -> list[str]:
    """Short names that differ, also from the base's: a run's name for its lora.safetensors, else the file's."""
    names = [shown(path.resolve().parent.name if path.stem == "lora" else path.stem, 60) for path in paths]
    taken = [BASE, *names]
    return [f"{name} ({i})" if taken.count(name) > 1 else name for i, name in enumerate(names, start=1)]


def plan(adapters: Sequence[Adapter], options: EvaluateConfig) -> Plan:
    """What is drawn and measured: as the options say, else the user's own settings, else the files.

    Raises UserError where none of them says it, or a file names what is not run on a file's word.
    """
    known = next(iter(written(adapters)), None)
    own = load_yaml(options.config) if options.config else None
    if known and not own and known.origin.few_step_lora == origin.OTHER:
        raise UserError(
            f"{shown(known.path)} was trained on a base with a few-step LoRA merged into it, and does not say which:"
            " give the settings of its run with --config."
        )
    config = own or (known.origin.config if known else Config())
    columns, rewards_from = _columns(adapters, own, options)
    model, model_from = _model(known, own, options)
    data, prompts_from = _prompts(known, own, options)
    e = config.evaluation
    config = replace(
        config,
        model=replace(config.model, path=model, device=options.device),
        data=data,
        evaluation=replace(e, steps=options.steps or e.steps, cfg=options.cfg or e.cfg),
    )
    terms = (*own.reward, *own.watch) if own else ()
    named = {term.name: term.options for term in _named(options) if term.options}
    validate(config)
    return Plan(
        config,
        columns,
        {term.name: term.options for term in terms} | named,
        {"model": model_from, "prompts": prompts_from, "rewards": rewards_from},
    )


def _model(known: Written | None, own: Config | None, options: EvaluateConfig) -> tuple[str, str]:
    """The base model, and who named it."""
    if options.model:
        if known and known.origin.base != origin.base_name(options.model):
            return options.model, f"--model; {known.path} was trained on {known.origin.base}"
        return options.model, "--model"
    if own:
        return own.model.path, str(options.config)
    if known and known.origin.base not in shipped.MODELS:
        raise UserError(
            f"{shown(known.path)} was trained on {shown(known.origin.base) or 'a model that it does not name'},"
            " and does not say where that lies: give it with --model."
        )
    return (known.origin.base, str(known.path)) if known else (EMBEDDED, "--model")


def _prompts(known: Written | None, own: Config | None, options: EvaluateConfig) -> tuple[DataConfig, str]:
    """The held-out prompts, and who named them."""
    if options.prompts:
        return DataConfig(held_out=options.prompts), "--prompts"
    if own:
        return own.data, str(options.config)
    if not known or not known.origin.held_out:
        raise UserError("The file names no held-out prompts that ship with DGPO: give some with --prompts FILE.")
    return DataConfig(held_out=known.origin.held_out), str(known.path)


def _columns(adapters: Sequence[Adapter], own: Config | None, options: EvaluateConfig) -> tuple[list[Column], str]:
    """What is measured, and who named it: a reward each, or a sum that a training's gain is told by."""
    names = [term.name for term in _named(options)]
    if names:
        return [Column(name, {name: 1.0}) for name in dict.fromkeys(names)], "--reward"
    if own:
        source = str(options.config)
        named = [own.evaluation.reward, *(term.name for term in own.reward)]
        refuse_files(named, shown(source), "name it with --reward to run it")  # before anything asks for its class
        weights = [evaluation_weights(own)]
    else:
        known = written(adapters)
        for file in known:
            _require_local(file)
        weights = [dict(file.origin.measured) for file in known]
        source = ", ".join(str(file.path) for file in known)
    if not all(weights):
        raise UserError("The training was on what people said: give a reward that can measure it with --reward NAME.")
    return list({"+".join(each): Column("+".join(each), each) for each in weights}.values()), source


def _named(options: EvaluateConfig) -> list[RewardTerm]:
    """What --reward names, each a column of its own."""
    return [term for item in options.reward for term in read_rewards(item, "--reward")]


def _require_local(file: Written) -> None:
    """Raises UserError for a reward that a file must not have run: code, a server, what is not DGPO's own."""
    for name in file.origin.measured:
        if name not in REWARDS or issubclass(reward_class(name), ServerReward):
            raise UserError(
                f"{shown(file.path)} names the reward {shown(name, 60)}, which is not run on a file's word: say"
                " what to measure with --reward NAME, or with --config and settings of your own."
            )


def make_judges(columns: Sequence[Column], options: Mapping[str, Mapping[str, Any]], device: str) -> dict[str, Reward]:
    """The rewards of all columns, with the options that the user's own settings give them."""
    names = dict.fromkeys(name for column in columns for name in column.weights)
    return {name: make_reward(name, options.get(name), device) for name in names}


# --- what comes of it ------------------------------------------------------------------------------------------------


def evaluate(options: EvaluateConfig) -> dict[str, Any]:
    """Measure base and adapters, print the table, write what is asked for; returns what --json writes."""
    start = time.monotonic()
    adapters = read_adapters(options)
    planned = plan(adapters, options)
    config, columns = planned.config, planned.columns
    world = World(options.device)
    if world.leads:
        _require_places(options)
        print(f"{planned}\n", flush=True)
    prompts = assemble.held_out_prompts(config)
    if not prompts:
        raise UserError("There are no held-out prompts: give some with --prompts FILE.")
    judges = make_judges(columns, planned.options, str(world.device))
    guard.check_prompts(judges, prompts)
    rows: dict[str, Evaluation] = {}
    pictures: dict[str, list[Group]] = {}
    for label, evaluation, groups in _measured(adapters, config, prompts, judges, options.images, world):
        rows[label], pictures[label] = evaluation, groups
        if world.leads:
            print(f"{label}: {len(evaluation)} images, {time.monotonic() - start:.0f} s", flush=True)
    table = Table(columns, rows, tags_of(prompts))
    if world.leads:
        print(f"\n{table}", flush=True)
        if options.report:
            _write_report(options.report, table, pictures, config)
    first = table.as_json()
    base, adapter = ({k: row[k] for k in ("mean", "ci95", "n")} for row in first[:2])
    told = {"reward": columns[0].name, "iterations": adapters[0].step, "base": base, "adapter": adapter}
    told |= {"table": first, "seconds": time.monotonic() - start}
    if world.leads and options.json:
        write_atomic(options.json, json.dumps(told, indent=2) + "\n")
    return told


def _measured(
    adapters: Sequence[Adapter],
    config: Config,
    prompts: Sequence[Prompt],
    judges: Mapping[str, Reward],
    images: int,
    world: World,
) -> Iterator[tuple[str, Evaluation, list[Group]]]:
    """The base, then each adapter: its label, scores, and the scored groups to show."""
    count = len(evaluation_set(prompts, images))
    shown = range(0, count, max(1, count // SHOWN_PROMPTS))[:SHOWN_PROMPTS]
    for place, (adapter, policy, size) in enumerate(_loaded(adapters, config, world.device)):
        policy.check_sources(prompts, size)
        held_out = HeldOut.of(config, policy, prompts, judges, size, world, tell=say)
        drawn: list[tuple[str, AdapterName | None]] = [(BASE, None), (adapter.label, "current")]
        for label, name in drawn[place > 0 :]:
            mine: list[tuple[int, Group]] = []

            def see(i: int, group: Group, kept: list[tuple[int, Group]] = mine) -> None:
                if i in shown:
                    kept.append((i, _in_short(group)))

            evaluation = held_out.score(name, images, see=see)
            seen = sorted(world.gather(mine), key=lambda place_and_group: place_and_group[0])
            yield label, evaluation, [group for _, group in seen]


def _in_short(group: Group) -> Group:
    """What a picture shows of a group, as it may go from one process to another."""
    scores = {name: values[:MOST_EACH].clone() for name, values in group.scores.items()}
    images = group.images[:MOST_EACH].clone()
    return replace(group, seeds=group.seeds[:MOST_EACH], latents=torch.empty(0), images=images, scores=scores)


def _loaded(
    adapters: Sequence[Adapter], config: Config, device: torch.device
) -> Iterator[tuple[Adapter, DiffusersPolicy, tuple[int, int]]]:
    """Each adapter on the model, which is loaded once as long as the adapters have the same branches."""
    policy: DiffusersPolicy | None = None
    size, last = (0, 0), None
    for adapter in adapters:
        if policy is None or last is None or not adapter.fits_as(last):
            policy = None  # its memory, before the next one is loaded
            policy, size = assemble.load_model(replace(config, lora=adapter.settings), device)
        else:
            policy.load_lora(adapter.file)
        last = adapter
        yield adapter, policy, size


def _require_places(options: EvaluateConfig) -> None:
    """Raises UserError for what could not be written once all is measured."""
    if options.json:
        require_writable(options.json)
    if options.report:
        try:
            options.report.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot make the folder {options.report}: {error.strerror}.") from None
        require_writable(options.report / "report.md")


def _write_report(folder: Path, table: Table, pictures: Mapping[str, Sequence[Group]], config: Config) -> None:
    write_atomic(folder / "report.png", picture(table, pictures))
    write_atomic(folder / "report.md", markdown(table, config))
    print(f"\n{folder / 'report.md'} and report.png")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 after a user's mistake."""
    return command(lambda: parse(EvaluateConfig, argv, "python -m dgpo_core.evaluate", __doc__), evaluate)


if __name__ == "__main__":
    sys.exit(main())
