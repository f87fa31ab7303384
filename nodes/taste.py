"""Taste: the artist's own answers and rated pictures as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_api.v0_0_2 import io, ui

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import check_folder_name
from dgpo_core.people.apprentice import ANSWERS
from dgpo_core.people.ask import FOLDER
from dgpo_core.people.judged import judged, read_answers
from dgpo_core.rewards.taste.features import features
from dgpo_core.rewards.taste.model import Taste as Fitted
from dgpo_core.rewards.taste.model import digest_of, fit, summary
from dgpo_core.rewards.taste.reward import served
from dgpo_core.settings.config import TASTE, RewardTerm

from .common import fields, host

INPUT = "input/"


class Taste(io.ComfyNode):
    """Fits a taste to answers, keeps it in models/reward_models, and gives it out as a reward."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DGPO_Taste",
            display_name="Taste",
            category=f"{host.CATEGORY}/rewards",
            **fields.aliases("human feedback", "preference model", "reward model", "personal", "aesthetic"),
            description="Scores images by your own taste, learned from what you ranked and rated before.",
            inputs=[
                io.String.Input("name", default="my_taste", tooltip="Its file in models/reward_models."),
                io.String.Input(
                    "sources",
                    default="",
                    multiline=True,
                    display_name="learn from",
                    tooltip="Names of trainings in which you answered, and folders of rated pictures as input/FOLDER, "
                    "one per line. Empty: take the taste of this name as it is.",
                ),
                io.Float.Input(
                    "weight", default=1.0, min=-1000.0, max=1000.0, step=0.01, tooltip="Negative: less is better."
                ),
                fields.Reward.Input(
                    "reward", optional=True, display_name="add to", tooltip="Rewards that this one is added to."
                ),
            ],
            outputs=[
                fields.Reward.Output(display_name="reward", tooltip="For the Reward Scorer, or the next reward."),
                io.String.Output(display_name="report", tooltip="What it was made of; how well it agrees with you."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str | None, sources: str | None) -> bool | str:
        """A name that is no file's, and sources that are not there, are told before anything runs."""
        return fields.first_error(name=(taste_file, name), sources=(answers_of, sources))

    @classmethod
    def fingerprint_inputs(cls, name: str | None, sources: str | None, **_: Any) -> list[Any]:
        """Other answers, or another file, make another taste; one that was written anew as it was does not."""
        taste = taste_file(name or "")
        files = [file for path in answers_of(sources or "") for file in _files(path)]
        seen = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file()]
        return [*seen, digest_of(taste) if taste.is_file() else ""]

    @classmethod
    def execute(
        cls, name: str, sources: str, weight: float, reward: Sequence[RewardTerm] | None = None
    ) -> io.NodeOutput:
        before = tuple(reward or ())
        if any(term.name == TASTE for term in before):
            raise UserError("A taste can be in a chain of rewards only once: fit one to all of your answers.")
        path = taste_file(name)
        notes: Sequence[str] = ()
        if answers := answers_of(sources):
            if path.exists():
                Fitted.load(path)  # nothing but a taste is written over
            notes = _fit(answers, path)
        report = f"{path.stem}: {summary(Fitted.load(path))}" if path.is_file() else ""
        served("", path.stem)  # says what is wrong with it
        term = RewardTerm(TASTE, weight, {"name": path.stem, "digest": digest_of(path)})
        return io.NodeOutput((*before, term), report, ui=ui.PreviewText("\n".join([report, *notes])))


def _fit(answers: Sequence[Path], path: Path) -> Sequence[str]:
    """Saves the taste of these answers; what of them was left out. Raises UserError where there is nothing to learn."""
    gallery = read_answers(answers)
    with host.engine():
        host.make_room()
        seen = features()
        with seen.on(host.device()):
            fit(judged(gallery.groups, seen, host.stop_if_cancelled), seen).save(path)
    return gallery.notes


def taste_file(name: str) -> Path:
    """Where a taste of this name is kept. Raises UserError for a name that no file can have."""
    stem = name.strip().removesuffix(".safetensors")
    check_folder_name(stem, "name of a taste")
    if not stem or stem.startswith("."):
        raise UserError("Give the taste a name, such as my_taste.")
    folder = Path(host.reward_folders()[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{stem}.safetensors"


def answers_of(sources: str) -> list[Path]:
    """The preference files of runs and the folders below input/ that the lines name. Raises UserError for others."""
    return [_source(line.strip()) for line in sources.splitlines() if line.strip()]


def _source(line: str) -> Path:
    if line.startswith(INPUT):
        return host.input_folder(line.removeprefix(INPUT))
    path = host.runs_folder() / host.check_run(line) / FOLDER / ANSWERS
    if not path.is_file():
        raise UserError(f"No answers are kept of a training {line!r}; a folder of rated pictures is {INPUT}FOLDER.")
    return path


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*")) if path.is_dir() else [path]


NODES = [Taste]
