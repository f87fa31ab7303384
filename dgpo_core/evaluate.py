"""`python -m dgpo_core.evaluate --lora FILE ...`: measure adapters against their base again, from the files alone.

Model, held-out prompts, reward, solver and guidance are those that the (first) file says it was made with, unless
options say otherwise; the seeds are the fixed ones of every evaluation, so all are compared on the same noise.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from dgpo_core import assemble, config_io
from dgpo_core.cli import command, parse
from dgpo_core.config import Config, LoraConfig, Range
from dgpo_core.distributed import World
from dgpo_core.errors import UserError
from dgpo_core.files import write_atomic
from dgpo_core.group import Group
from dgpo_core.measure import Evaluation, evaluation_set, evaluation_weights, score_evaluation
from dgpo_core.policy import Policy, lora_file
from dgpo_core.prompts import Prompt
from dgpo_core.report import Column, Table, markdown, picture
from dgpo_core.rewards import Reward, make_reward, refuse_files

SHOWN_PROMPTS = 6  # rows of the picture


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure."""

    lora: tuple[Path, ...] = ()
    """The adapters, one or more .safetensors files; those that `dgpo_core.train` wrote know all that is needed."""
    json: Path | None = None
    """Write the result to this file, in the form of a run's summary.json, with the whole table."""
    report: Path | None = None
    """Write report.md and report.png, the same prompts and seeds side by side, into this folder."""
    images: Annotated[int, Range(2, 1_000_000)] = 512
    """Images of the base and of each adapter, at least 2."""
    model: str = ""
    """The base model; empty is the one that the file names."""
    prompts: str = ""
    """A .txt or .jsonl file of prompts; empty is the held-out prompts that the file names."""
    reward: tuple[str, ...] = ()
    """The rewards to measure, one or more; none is those that the files name."""
    steps: Annotated[int, Range(0, 1000)] = 0
    """Solver steps; 0 is as the file says."""
    cfg: Annotated[float, Range(0, 100)] = 0.0
    """Guidance scale; 0 is as the file says, 1 is no guidance."""
    device: str = "auto"
    """Where to run: cpu, cuda, cuda:1, mps; 'auto' takes the first accelerator there is."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA file. config: the settings it was trained with; None where it does not say."""

    label: str
    file: lora_file.LoraFile
    config: Config | None

    @property
    def step(self) -> int:
        return int(self.file.metadata.get("dgpo.step", 0))

    @property
    def settings(self) -> LoraConfig:
        """The branches that it goes into."""
        settings = self.config.lora if self.config else LoraConfig(self.file.rank, float(self.file.rank))
        return replace(settings, init=str(self.file.path))

    def fits_as(self, other: "Adapter") -> bool:
        """Whether it can take the place of the other one on the same loaded model."""
        same = replace(self.settings, init="") == replace(other.settings, init="")
        return same and self.file.rank == other.file.rank and self.file.modules == other.file.modules


# --- what is asked ---------------------------------------------------------------------------------------------------


def read_adapters(options: EvaluateConfig) -> list[Adapter]:
    """The files, with a name for each. Raises UserError for one that is missing, no LoRA, or of another base."""
    if not options.lora:
        raise UserError("There is no LoRA to measure: give one or more files with --lora FILE.")
    files = [lora_file.read(path) for path in options.lora]
    configs = [_config_of(file) for file in files]
    known = [(file, config) for file, config in zip(files, configs, strict=True) if config]
    plain = next((file for file, config in zip(files, configs, strict=True) if not config), None)
    if plain and not known and not (options.model and options.prompts and options.reward):
        raise UserError(
            f"{plain.path} was not written by DGPO, so its metadata do not say how to measure it: give --model,"
            " --prompts and --reward."
        )
    for file, config in known[1:]:
        first, here = (Path(each.model.path).name for each in (known[0][1], config))
        if first != here and not options.model:
            raise UserError(
                f"{file.path} was trained on {here}, {known[0][0].path} on {first}: compare adapters of one base model,"
                " or give --model."
            )
    labels = _labels(options.lora)
    return [Adapter(label, file, config) for label, file, config in zip(labels, files, configs, strict=True)]


def _config_of(file: lora_file.LoraFile) -> Config | None:
    text = file.metadata.get("dgpo.config")
    return config_io.from_dict(json.loads(text), source=str(file.path)) if text else None


def _labels(paths: Sequence[Path]) -> list[str]:
    """Short names that differ: a run's name for its lora.safetensors, else the file's."""
    names = [path.resolve().parent.name if path.stem == "lora" else path.stem for path in paths]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]


def settings_of(adapters: Sequence[Adapter], options: EvaluateConfig) -> Config:
    """How all of them are drawn: as the first file that says so, and as the options say."""
    config = next((adapter.config for adapter in adapters if adapter.config), Config())
    e = config.evaluation
    return replace(
        config,
        model=replace(config.model, path=options.model or config.model.path, device=options.device),
        data=replace(config.data, held_out=options.prompts, held_out_text="") if options.prompts else config.data,
        evaluation=replace(e, steps=options.steps or e.steps, cfg=options.cfg or e.cfg),
    )


def columns_of(adapters: Sequence[Adapter], options: EvaluateConfig) -> list[Column]:
    """What is measured: every reward that is asked for, or what the files measure their gain by."""
    names = [name for item in options.reward for name in item.split(",") if name]
    if names:
        return [Column(name, {name: 1.0}) for name in dict.fromkeys(names)]
    for adapter in adapters:
        terms = adapter.config.reward if adapter.config else ()
        chosen = [adapter.config.evaluation.reward] if adapter.config else []
        refuse_files(
            [*chosen, *(term.name for term in terms)], str(adapter.file.path), "name it with --reward to run it"
        )
    weights = [evaluation_weights(adapter.config) for adapter in adapters if adapter.config]
    return list({"+".join(each): Column("+".join(each), each) for each in weights}.values())


def make_judges(adapters: Sequence[Adapter], columns: Sequence[Column], device: str) -> dict[str, Reward]:
    """The rewards of all columns, with the options that the files trained them with."""
    terms = [term for adapter in adapters if adapter.config for term in (*adapter.config.reward, *adapter.config.watch)]
    options = {term.name: term.options for term in terms}
    names = dict.fromkeys(name for column in columns for name in column.weights)
    return {name: make_reward(name, options.get(name), device) for name in names}


# --- what comes of it ------------------------------------------------------------------------------------------------


def evaluate(options: EvaluateConfig) -> dict[str, Any]:
    """Measure base and adapters, print the table and write the report; returns what --json writes."""
    start = time.monotonic()
    adapters = read_adapters(options)
    config, columns = settings_of(adapters, options), columns_of(adapters, options)
    world = World(options.device)
    prompts = assemble.held_out_prompts(config)
    if not prompts:
        raise UserError("The file names no held-out prompts: give some with --prompts FILE.")
    if not all(column.weights for column in columns):
        raise UserError("A file was trained on what people said: give a reward that can measure it with --reward NAME.")
    judges = make_judges(adapters, columns, str(world.device))
    rows: dict[str, Evaluation] = {}
    pictures: dict[str, list[Group]] = {}
    for label, evaluation, groups in _measured(adapters, config, prompts, judges, options.images, world):
        rows[label], pictures[label] = evaluation, groups
        if world.leads:
            print(f"{label}: {len(evaluation)} images, {time.monotonic() - start:.0f} s", flush=True)
    table = Table(columns, rows)
    if world.leads:
        print(f"\n{table}")
        if options.report:
            _write_report(options.report, table, pictures, config)
    first = table.as_json()
    base, adapter = ({k: row[k] for k in ("mean", "ci95", "n")} for row in first[:2])
    told = {"reward": columns[0].name, "iterations": adapters[0].step, "base": base, "adapter": adapter}
    return told | {"table": first, "seconds": time.monotonic() - start}


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
    for place, (adapter, policy, size) in enumerate(_loaded(adapters, config, world)):
        for label, name in [("base", None), (adapter.label, "current")][place > 0 :]:
            groups: list[Group] = []

            def see(i: int, group: Group, kept: list[Group] = groups) -> None:
                if i in shown:
                    kept.append(group)

            found = score_evaluation(policy, name, prompts, judges, config, size, images, world, see=see)
            yield label, found, groups


def _loaded(
    adapters: Sequence[Adapter], config: Config, world: World
) -> Iterator[tuple[Adapter, Policy, tuple[int, int]]]:
    """Each adapter on the model, which is loaded once as long as the adapters have the same branches."""
    policy, size, last = None, (0, 0), None
    for adapter in adapters:
        if policy is None or not adapter.fits_as(last):
            policy = None  # its memory, before the next one is loaded
            policy, size = assemble.load_model(replace(config, lora=adapter.settings), world)
        else:
            policy.load_lora(adapter.file)
        last = adapter
        yield adapter, policy, size


def _write_report(folder: Path, table: Table, pictures: Mapping[str, Sequence[Group]], config: Config) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make the folder {folder}: {error.strerror}.") from None
    write_atomic(folder / "report.png", picture(table, pictures))
    write_atomic(folder / "report.md", markdown(table, config))
    print(f"\n{folder / 'report.md'} and report.png")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 after a user's mistake."""
    return command(lambda: parse(EvaluateConfig, argv, "python -m dgpo_core.evaluate", __doc__), _evaluate)


def _evaluate(options: EvaluateConfig) -> None:
    result = evaluate(options)
    if options.json:
        write_atomic(options.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
