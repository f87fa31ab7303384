"""Rewards that are not part of DGPO: a class in a Python file, or an entry point of an installed package."""

import json
import sys
from pathlib import Path

import pytest
import torch
from engine import write_quick
from judge_server import serving

from dgpo_core import evaluate
from dgpo_core.comfy.workflow import Workflow, training_of
from dgpo_core.common.errors import UserError
from dgpo_core.rewards import known_rewards, make_reward, weights_of
from dgpo_core.rewards.serve import RewardServer
from dgpo_core.runs.options import parse_args
from dgpo_core.settings.config import RewardTerm
from dgpo_core.settings.yaml_file import load_yaml, to_yaml
from dgpo_core.train import main

SOURCE = """
import torch
from dgpo_core.rewards import Reward

class Redness(Reward):
    def __init__(self, device="cpu", factor=1.0):
        super().__init__(device)
        self.factor = factor

    def score(self, images, prompts, metadata):
        return self.factor * images[:, 0].mean((1, 2))

class Paleness(Redness):
    higher_is_better = False

class NoReward:
    pass

class Clumsy(Redness):
    def __init__(self, device="cpu"):
        raise RuntimeError("cannot start")
"""
RED = torch.tensor([0.2, 0.7]).view(2, 1, 1, 1).expand(2, 3, 4, 4)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with rewards, named relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/rewards.py").write_text(SOURCE)
    return "mine/rewards.py"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with two entry points, one of which names what is not there."""
    site = tmp_path / "site"
    info = site / "nice_rewards-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "nice_rewards.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nice-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dgpo.rewards]\nredness = nice_rewards:Redness\nlost = nice_rewards:Lost\nocr = nice_rewards:Redness\n"
    )
    monkeypatch.syspath_prepend(str(site))


def test_a_class_in_a_file_scores(file: str) -> None:
    scores = make_reward(f"{file}:Redness", {"factor": 2.0}).score(RED, ["a"] * 2, [{}] * 2)
    assert scores.tolist() == pytest.approx([0.4, 1.4])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mine/gone.py:Redness", r"There is no file mine/gone.py with a reward"),
        ("mine/rewards.py:Rednes", r"has no class Rednes\."),
        ("mine/rewards.py:NoReward", r"is not a class that derives from dgpo_core.rewards.Reward"),
        ("mine/rewards.py:Clumsy", r"cannot be made: RuntimeError: cannot start"),
        ("mine/broken.py:X", r"The reward file mine/broken.py cannot be run: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(file: str, name: str, says: str) -> None:
    Path("mine/broken.py").write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(UserError, match=says):
        make_reward(name)


def test_an_entry_point_is_a_reward_like_any_other(package: None) -> None:
    assert "redness" in known_rewards()
    assert known_rewards().count("ocr") == 1
    assert make_reward("redness").score(RED, ["a"] * 2, [{}] * 2).tolist() == pytest.approx([0.2, 0.7])
    assert type(make_reward("brightness")).__module__ == "dgpo_core.rewards.statistics"
    with pytest.raises(UserError, match="did you mean 'redness'"):
        make_reward("rednes")
    with pytest.raises(UserError, match="'lost': nice_rewards:Lost cannot be imported"):
        make_reward("lost")


def test_where_lower_is_better_the_weight_turns_its_sign(file: str) -> None:
    terms = (RewardTerm(f"{file}:Redness", 0.5), RewardTerm(f"{file}:Paleness", 2.0), RewardTerm("human", 1.0))
    assert weights_of(terms) == {f"{file}:Redness": 0.5, f"{file}:Paleness": -2.0, "human": 1.0}


def test_a_file_may_hold_whatever_a_module_may(tmp_path: Path) -> None:
    """A dataclass looks its module up by name where annotations are texts; two files may have one name."""
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Of:\n    x: int\n"
    )
    for folder, factor in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"{source}{SOURCE}\nclass Mine(Redness):\n    factor = {factor}\n")
    classes = [type(make_reward(f"{tmp_path}/{folder}/mine.py:Mine")) for folder in "ab"]
    assert [cls.factor for cls in classes] == [1, 2]
    assert all(sys.modules[cls.__module__].Mine is cls for cls in classes)


def test_one_whose_lower_scores_are_better_is_the_same_over_remote(file: str) -> None:
    name = f"{file}:Paleness"
    with serving(RewardServer(name, make_reward(name), "127.0.0.1", 0)) as url:
        here, there = make_reward(name), make_reward("remote", {"url": url})
        white = torch.ones(1, 3, 4, 4)
        by_name = weights_of((RewardTerm(name), RewardTerm("remote")))
        scores = {name: here.score(white, ["a"], [{}]), "remote": there.score(white, ["a"], [{}])}
    assert by_name[name] * scores[name] == by_name["remote"] * scores["remote"]


def test_a_file_goes_through_the_command_line_and_yaml(file: str) -> None:
    config = parse_args(["--reward", f"{file}:Redness=0.5?{file}:Paleness<0.9,{file}:Paleness=0"])
    assert config.reward[0] == RewardTerm(f"{file}:Redness", 0.5, {}, f"{file}:Paleness<0.9")
    Path("again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_yaml("again.yaml") == config


@pytest.mark.slow
def test_a_run_with_a_file_trains_resumes_and_is_measured_again(
    file: str, sd3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{file}:Redness"
    settings = [*write_quick(tmp_path, sd3_folder, reward=f"{name}=2", iterations=1), "--trust-code"]
    assert main(settings) == 0
    assert main([*settings, "--resume", "--iterations", "2"]) == 0
    records = [json.loads(line) for line in (tmp_path / "runs/test/metrics.jsonl").read_text().splitlines()]
    assert all(f"reward/{name}" in r for r in records if "loss" in r)
    lora = str(tmp_path / "runs/test/lora.safetensors")
    # a file that somebody gives away must not say which code runs here
    own = ["--lora", lora, "--images", "2", "--model", str(sd3_folder), "--prompts", str(tmp_path / "held_out.txt")]
    assert evaluate.main(own) == 2
    assert "names the reward other, which is not run on a file's word" in capsys.readouterr().err
    assert evaluate.main([*own, "--reward", name]) == 0


def test_a_workflow_runs_no_file(file: str, tmp_path: Path) -> None:
    workflow = Path(__file__).parents[2] / "workflows/api/quickstart.json"
    data = json.loads(workflow.read_text())
    reward = next(node for node in data.values() if node["class_type"] == "DGPO_Reward")
    reward["inputs"]["only_if"] = "ocr > 0.5"
    (tmp_path / "w.json").write_text(json.dumps(data))
    assert training_of(Workflow(tmp_path / "w.json"))["reward"][0]["only_if"] == "ocr > 0.5"
    reward["inputs"]["name"] = f"{file}:Redness"
    (tmp_path / "w.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="names the Python file of a reward .* which is not run: give it with --reward"):
        training_of(Workflow(tmp_path / "w.json"))
