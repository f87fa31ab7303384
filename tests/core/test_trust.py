"""What a file may decide, by whose it is: no code, no address and no secret from what somebody else wrote."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine import write_quick
from judge_server import serving

from dgpo_core.comfy.workflow import Workflow, training_of
from dgpo_core.common.errors import UserError
from dgpo_core.rewards import REWARDS, make_reward, reward_class, trust
from dgpo_core.rewards.serve import RewardServer
from dgpo_core.runs.options import parse_args
from dgpo_core.runs.run import Run
from dgpo_core.settings.config import RewardTerm
from dgpo_core.train import main

pytestmark = pytest.mark.slow

WORKFLOW = Path(__file__).parents[2] / "workflows/api/quickstart.json"
CODE = """
import pathlib
from dgpo_core.rewards import Reward

pathlib.Path("ran").touch()

class Evil(Reward):
    def score(self, images, prompts, metadata):
        return images.mean((1, 2, 3))
"""

PRIVATE = {
    "pickscore": {"path", "processor"},
    "hpsv2": {"path"},
    "image_reward": {"path", "tokenizer"},
    "clip_score": {"path"},
    "clip_direction": {"path"},
    "aesthetic": {"path", "clip"},
    "geneval": {"detector", "clip"},
    "geneval_training": {"detector", "clip"},
    "taste": {"path", "clip"},
    "vlm_judge": {"url", "key_env", "pattern", "request"},
    "remote": {"url", "token_env"},
}
"""The options that only the machine's own user may set: addresses, paths, variables, and what can run without end."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands are given; with the file of a reward that leaves a mark when it is run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(CODE)
    return tmp_path


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    return told


# --- what a workflow may set ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
def test_every_option_is_either_shareable_or_known_to_be_the_users_own(name: str) -> None:
    cls = reward_class(name)
    taken = set(inspect.signature(cls).parameters) - {"device"}
    assert set(cls.shareable) <= taken
    assert taken - set(cls.shareable) == PRIVATE.get(name, set())


def workflow(here: Path, name: str, options: dict[str, Any]) -> Path:
    data = json.loads(WORKFLOW.read_text())
    data["4"]["inputs"] |= {"name": name, "options": json.dumps(options)}
    (here / "w.json").write_text(json.dumps(data))
    return here / "w.json"


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in PRIVATE for option in sorted(PRIVATE[name])])
def test_a_workflow_sets_no_address_no_path_and_no_variable(name: str, option: str, here: Path) -> None:
    with pytest.raises(UserError) as error:
        training_of(Workflow(workflow(here, name, {option: "HOME"})))
    told = str(error.value)
    assert f"sets the option {option} of the reward {name}, which only you can decide on this machine: " in told
    assert "HOME" not in told.replace(str(here), "")
    if option in ("url", "key_env", "token_env"):
        assert 'use {"endpoint": "my_server"} instead, and write a line such as `my_server: {url: ADDRESS' in told
        assert "endpoints.yaml (" in told


def test_a_workflow_names_an_endpoint_and_what_is_harmless(here: Path) -> None:
    options = {"endpoint": "judge", "model": "m", "max_calls": 9, "template": "{prompt}?", "low": 1, "high": 5}
    assert training_of(Workflow(workflow(here, "vlm_judge", options)))["reward"][0]["options"] == options
    assert training_of(Workflow(workflow(here, "ocr", {"threads": 2})))["reward"][0]["options"] == {"threads": 2}


def test_a_workflow_names_a_file_of_weights_by_its_name_in_the_folder_of_reward_models(here: Path) -> None:
    def options(name: str, choice: str) -> dict[str, Any]:
        data = json.loads(workflow(here, name, {"batch": 2}).read_text())
        data["4"]["inputs"]["weights_file"] = choice
        (here / "w.json").write_text(json.dumps(data))
        return training_of(Workflow(here / "w.json"))["reward"][0]["options"]

    assert options("pickscore", "mine.safetensors") == {"batch": 2, "weights_file": "mine.safetensors"}
    assert options("pickscore", "a\\mine.safetensors") == {"batch": 2, "weights_file": "a/mine.safetensors"}
    for choice in ("automatic", "PickScore_v1.safetensors"):  # which is found without a choice
        assert options("pickscore", choice) == {"batch": 2}
    for choice in ("../mine.safetensors", str(here / "mine.safetensors")):
        (here / "mine.safetensors").touch()
        with pytest.raises(UserError, match="are not the name of a file in the folder of reward models"):
            make_reward("pickscore", options("pickscore", choice))
    with pytest.raises(UserError, match="'ocr' does not take the weights mine.safetensors: choose automatic"):
        options("ocr", "mine.safetensors")


def test_a_reward_of_another_package_shares_what_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asking(reward_class("brightness")):
        shareable = ("harmless",)

        def __init__(self, device: str = "cpu", **options: Any) -> None: ...

    monkeypatch.setattr(trust, "reward_class", lambda name: Asking)
    trust.check_shared([RewardTerm("asking", 1.0, {"harmless": 1})], "The workflow")
    with pytest.raises(UserError, match="sets the option address of the reward asking, .*: leave it out, or set it in"):
        trust.check_shared([RewardTerm("asking", 1.0, {"address": "http://evil"})], "The workflow")


# --- code ------------------------------------------------------------------------------------------------------------

PLACES = {
    "reward": "reward: {'evil.py:Evil': 1}",
    "watch": "watch: [{name: 'evil.py:Evil'}]",
    "evaluation.reward": "evaluation: {reward: 'evil.py:Evil'}",
}


@pytest.mark.parametrize("content", PLACES.values(), ids=PLACES)
def test_a_settings_file_that_brings_code_needs_trust(
    content: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "a.yaml").write_text(content)
    told = refusal(["--config", "a.yaml"], capsys)
    assert "a.yaml runs the Python code evil.py:Evil, which can do whatever you can: read it, then" in told
    assert "pass --trust-code" in told
    assert not (here / "ran").exists()
    assert trust.code_of(parse_args(["--config", "a.yaml", "--trust-code"])) == ["evil.py:Evil"]


def test_code_that_is_typed_in_the_same_command_is_trusted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.yaml").write_text("reward: {'evil.py:Evil': 2}\nwatch: [{name: 'evil.py:Other'}]\n")
    assert "evil.py:Other" in refusal(["--config", "a.yaml", "--reward", "evil.py:Evil=2"], capsys)
    typed = ["--config", "a.yaml", "--reward", "evil.py:Evil=2", "--watch", "entropy"]
    assert trust.code_of(parse_args(typed)) == ["evil.py:Evil"]
    assert not (here / "ran").exists()


def test_a_run_tells_what_code_it_runs_and_a_resumed_one_asks_for_trust(
    here: Path, sd3_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = write_quick(here, sd3_folder, iterations=1, evaluation={"final_images": 0})
    assert main([*argv, "--reward", "evil.py:Evil"]) == 0
    assert "Code that is run: evil.py:Evil\n" in capsys.readouterr().out
    (here / "ran").unlink()
    resume = ["--resume", "--name", "test", "--iterations", "2"]
    assert "runs/test/config.yaml runs the Python code evil.py:Evil" in refusal(resume, capsys)
    assert not (here / "ran").exists()
    assert main([*resume, "--trust-code"]) == 0
    assert "Code that is run: evil.py:Evil\n" in capsys.readouterr().out
    assert main(["--resume", "--name", "test", "--iterations", "3", "--reward", "evil.py:Evil"]) == 0


def test_a_models_folder_runs_no_code(here: Path, sd3_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(sd3_folder, here / "model")
    index = json.loads((here / "model/model_index.json").read_text())
    for part, of in (("transformer", "evil"), ("vae", "evil"), ("_class_name", "pipeline")):
        changed = {**index, part: [of, "Evil"]}
        (here / "model/model_index.json").write_text(json.dumps(changed))
        for place in (f"{part}/{of}.py", f"{of}.py"):
            (here / "model" / place).parent.mkdir(exist_ok=True)
            (here / "model" / place).write_text(CODE)
        refusal(["--model.path", "model", "--model.device", "cpu", "--data.held_out", ""], capsys)
        assert not (here / "ran").exists()


# --- servers ---------------------------------------------------------------------------------------------------------


def test_servers_are_told_before_they_are_asked_and_a_resumed_one_needs_trust(
    here: Path, sd3_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKEN", "t0ken")
    with serving(RewardServer("brightness", make_reward("brightness"), "127.0.0.1", 0, "t0ken")) as url:
        reward = [{"name": "remote", "options": {"url": url, "token_env": "TOKEN"}}]
        argv = write_quick(here, sd3_folder, iterations=1, reward=reward, evaluation={"final_images": 0})
        assert main(argv) == 0
        told = f"Server that is asked: {url} with the key in the variable TOKEN (reward remote)\n"
        assert told in capsys.readouterr().out
        resume = ["--resume", "--name", "test", "--iterations", "2"]
        refused = "config.yaml sets the option url of the reward remote: if you trust the folder, pass --trust-code"
        assert refused in refusal(resume, capsys)
        assert main([*resume, "--trust-code"]) == 0
        assert told in capsys.readouterr().out
        # what the user's own file says is trusted, as at the start
        assert main([*argv, "--resume", "--iterations", "3"]) == 0
        assert told in capsys.readouterr().out


def test_a_run_with_an_endpoint_resumes_by_itself_and_keeps_only_its_name(
    here: Path, sd3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGPO_ENDPOINTS", str(here / "mine.yaml"))
    with serving(RewardServer("brightness", make_reward("brightness"), "127.0.0.1", 0)) as url:
        (here / "mine.yaml").write_text(f"card: {{url: '{url}'}}\n")
        reward = [{"name": "remote", "options": {"endpoint": "card"}}]
        argv = write_quick(here, sd3_folder, iterations=1, reward=reward, evaluation={"final_images": 0})
        assert main(argv) == 0
        assert url not in (here / "runs/test/config.yaml").read_text()
        assert main(["--resume", "--name", "test", "--iterations", "2"]) == 0


def test_a_key_that_stands_where_a_variable_should_is_not_told() -> None:
    config = parse_args([])
    reward = (RewardTerm("remote", 1.0, {"url": "http://127.0.0.1:1", "token_env": "sk-secret"}),)
    (told,) = trust.uses(type(config)(reward=reward))
    assert told == "Server that is asked: http://127.0.0.1:1 with the key in a variable that is not set (reward remote)"


def test_a_taste_of_a_resumed_folder_is_taken_where_the_command_names_it_again(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Run.open(parse_args(["--name", "mine", "--reward", "taste=a.safetensors"])):
        pass
    assert "sets the option path of the reward taste" in refusal(["--name", "mine", "--resume"], capsys)
    again = parse_args(["--name", "mine", "--resume", "--reward", "taste=a.safetensors"])
    assert again.reward[0].options == {"path": "a.safetensors"}
    assert "sets the option path" in refusal(["--name", "mine", "--resume", "--watch", "taste=b.safetensors"], capsys)


def test_weights_of_a_resumed_folder_need_trust(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.yaml").write_text("reward: [{name: clip_score, options: {path: /elsewhere}}]")
    with Run.open(parse_args(["--config", "a.yaml", "--name", "test"])):
        pass
    assert "sets the option path of the reward clip_score" in refusal(["--resume", "--name", "test"], capsys)


def test_the_terminal_is_not_steered_by_what_stands_in_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.yaml").write_text('reward: [{name: "a\\e[2Jb.py:X"}]\n')
    assert "\\x1b[2Jb.py:X" in refusal(["--config", "a.yaml"], capsys)
    (here / "\x1b[2J.yaml").write_text("iterations: x")
    assert refusal(["--config", "\x1b[2J.yaml"], capsys).strip().isprintable()
    assert refusal(["--data.prompts", "\x1b[2J.txt"], capsys).strip().isprintable()
