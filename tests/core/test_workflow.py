"""A shared workflow's training settings: the same from API and UI format, refused where only ComfyUI can run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgpo_core.comfy.forms import EDITS, EDITS_HELD_OUT, EMBEDDED_EDITOR
from dgpo_core.comfy.teach import load_training
from dgpo_core.comfy.workflow import Workflow, training_of
from dgpo_core.common.errors import UserError
from dgpo_core.runs.assemble import held_out_prompts
from dgpo_core.runs.options import parse_args
from dgpo_core.settings.config import Config
from dgpo_core.settings.presets import load_preset
from dgpo_core.settings.recipes import recipe
from dgpo_core.settings.validation import validate
from dgpo_core.settings.values import from_dict

WORKFLOWS = Path(__file__).parents[2] / "workflows"


def read(path: Path) -> Config:
    return from_dict(training_of(Workflow(path)), Config(), str(path))


def changed(tmp_path: Path, name: str, **inputs: dict[str, Any]) -> Path:
    """A copy of an API workflow with inputs of single nodes changed."""
    data = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
    for id_, values in inputs.items():
        data[id_.strip("_")]["inputs"] |= values
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(data))
    return path


def test_the_quickstart_workflow_trains_as_the_quickstart_preset_does() -> None:
    config, preset = read(WORKFLOWS / "api" / "quickstart.json"), load_preset("quickstart")
    for group in ("training", "rollout", "lora", "memory", "reward", "combine", "seed"):
        assert getattr(config, group) == getattr(preset, group), group
    assert (config.model.path, config.model.dtype, config.data.prompts) == ("embedded", "float32", "embedded")
    assert config.iterations == 40


def test_a_switch_that_saves_memory_does_so_where_it_is_needed(tmp_path: Path) -> None:
    on, off = ({"gradient_checkpointing": switch, "offload": switch} for switch in (True, False))
    for switches, expected in ((on, "auto"), (off, False)):
        memory = read(changed(tmp_path, "quickstart", _1=switches)).memory
        assert (memory.gradient_checkpointing, memory.offload) == (expected, expected)


def test_the_embedded_editor_and_its_edits_are_read_by_their_names(tmp_path: Path) -> None:
    choices = {"_1": {"model": EMBEDDED_EDITOR}, "_2": {"source": EDITS}, "_9": {"source": EDITS_HELD_OUT}}
    config = read(changed(tmp_path, "quickstart", **choices))
    assert config.model.path == "embedded-editor"
    assert config.data.prompts == config.data.held_out == "embedded-edits"


@pytest.mark.parametrize("name", ["quickstart", "quickstart_edits", "visual_loop"])
def test_the_ui_file_says_the_same_as_the_api_file(name: str) -> None:
    assert training_of(Workflow(WORKFLOWS / f"{name}.json")) == training_of(
        Workflow(WORKFLOWS / "api" / f"{name}.json")
    )


def test_teach_is_its_recipe_for_so_many_minutes(tmp_path: Path) -> None:
    config = parse_args(["--workflow", str(WORKFLOWS / "start_here.json"), "--output", str(tmp_path)])
    chosen = recipe("embedded", people=False)
    for group in ("training", "rollout", "lora", "memory", "evaluation", "combine"):
        assert getattr(config, group) == getattr(chosen, group), group
    assert (config.name, config.minutes, config.seed, config.data.order_seed) == ("teach", 2.0, 0, 0)
    assert [term.name for term in config.reward] == ["shapes_graded"]
    assert config == parse_args(["--workflow", str(WORKFLOWS / "api" / "start_here.json"), "--output", str(tmp_path)])


def test_teach_goes_by_the_kind_of_its_model(tmp_path: Path) -> None:
    given = {"model": "checkpoints/a.safetensors", "source": "the text below", "judge": "brightness", "size": 256}
    config = from_dict(
        load_training(
            changed(tmp_path, "start_here", _1=given), {"models/checkpoints/a.safetensors": "sdxl"}.__getitem__
        )
    )
    assert config.training == recipe("sdxl", people=False).training
    assert (config.model.path, config.model.height) == ("models/checkpoints/a.safetensors", 256)
    assert (config.data.held_out, config.data.text.splitlines()[0]) == ("", "a red circle")


def test_teach_with_a_person_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, "start_here", _1={"judge": "I choose"})
    with pytest.raises(
        UserError, match=r"DGPO_Teach asks a person, which only runs in ComfyUI: choose a reward as its judge"
    ):
        load_training(path, str)


def test_a_preset_chosen_in_the_node_goes_before_its_widgets(tmp_path: Path) -> None:
    path = changed(tmp_path, "quickstart", _5={"preset": "sdxl-pickscore", "lr": 0.5})
    assert read(path).training == load_preset("sdxl-pickscore").training
    path = changed(tmp_path, "quickstart", _5={"preset": "mode 2b"})
    assert read(path).training.reference == "old"


def test_rewards_are_read_along_their_chain(tmp_path: Path) -> None:
    data = json.loads((WORKFLOWS / "api" / "quickstart.json").read_text())
    more = {"name": "ocr", "weight": 0.5, "options": '{"a": 1}', "reward": ["4", 0]}
    data["20"] = {"class_type": "DGPO_Reward", "inputs": more}
    data["6"]["inputs"]["reward"] = ["20", 0]
    path = tmp_path / "two.json"
    path.write_text(json.dumps(data))
    terms = read(path).reward
    assert [(term.name, term.weight) for term in terms] == [("shapes_graded", 1.0), ("ocr", 0.5)]
    assert terms[1].options == {"a": 1}


def test_files_are_looked_for_as_in_comfyuis_folder(tmp_path: Path) -> None:
    chosen = {"model": "checkpoints/my.safetensors", "start_from": "dgpo/a.safetensors"}
    config = read(changed(tmp_path, "quickstart", _1=chosen, _2={"source": "mine.txt"}, _9={"source": "other.txt"}))
    assert config.model.path == "models/checkpoints/my.safetensors"
    assert config.lora.init == "models/loras/dgpo/a.safetensors"
    assert (config.data.prompts, config.data.held_out) == ("input/mine.txt", "input/other.txt")


def test_what_the_loop_watches_is_evaluated_headless(tmp_path: Path) -> None:
    watched = {"class_type": "DGPO_Reward", "inputs": {"name": "clip_score", "weight": 3.0, "options": ""}}
    path = changed(tmp_path, "quickstart", _6={"evaluate_every": 7, "on_alarm": "stop", "watch": ["10", 0]})
    data = json.loads(path.read_text()) | {"10": watched}
    data["9"]["inputs"] |= {"source": "the text below", "text": "a red circle\ntwo blue squares"}
    path.write_text(json.dumps(data))
    config = read(path)
    assert (config.evaluation.every, config.evaluation.images, config.evaluation.on_alarm) == (7, 64, "stop")
    assert [(term.name, term.weight) for term in config.watch] == [("clip_score", 1.0)]
    assert [prompt.text for prompt in held_out_prompts(config)] == ["a red circle", "two blue squares"]
    assert read(WORKFLOWS / "api" / "quickstart.json").data.held_out == "embedded"


def test_a_loop_from_before_watching_is_read_as_it_was(tmp_path: Path) -> None:
    data = json.loads((WORKFLOWS / "api" / "quickstart.json").read_text())
    for name in ("held_out", "evaluate_every", "evaluation_images", "on_alarm"):
        del data["6"]["inputs"][name]
    data["2"]["inputs"] |= {"source": "mine.txt"}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data))
    config = read(path)
    assert (config.data.held_out, config.watch, config.evaluation.every) == ("", (), Config().evaluation.every)


def test_a_scheduler_of_comfyui_is_kept_and_the_models_own_is_none(tmp_path: Path) -> None:
    assert read(WORKFLOWS / "api" / "quickstart.json").rollout.scheduler == ""
    assert read(changed(tmp_path, "quickstart", _3={"scheduler": "karras"})).rollout.scheduler == "karras"
    path = tmp_path / "older.json"  # saved before there was a choice
    data = json.loads((WORKFLOWS / "api" / "quickstart.json").read_text())
    del data["3"]["inputs"]["scheduler"]
    path.write_text(json.dumps(data))
    assert read(path).rollout.scheduler == ""


def test_the_command_line_goes_before_the_workflow() -> None:
    path = str(WORKFLOWS / "quickstart.json")
    config = parse_args(["--workflow", path, "--iterations", "3", "--training.lr", "1e-5"])
    assert (config.name, config.iterations, config.training.lr, config.rollout.steps) == ("quickstart", 3, 1e-5, 8)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("human_ranking", "DGPO_HumanRanker at 'scored' of DGPO_LoRATrainer, which only runs in ComfyUI"),
        ("any_node_as_reward", "DGPO_ScoresFromGraph at 'scored'"),
        ("apply_lora", "no node that trains"),
    ],
)
def test_what_only_runs_in_comfyui_is_refused_in_one_sentence(name: str, says: str) -> None:
    for folder in (WORKFLOWS, WORKFLOWS / "api"):
        with pytest.raises(UserError, match=says):
            training_of(Workflow(folder / f"{name}.json"))


# --- what somebody else's file may do ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        *("../secrets.txt", "..\\secrets.txt", "a/../../secrets.txt", "a\\..\\..\\secrets.txt", "/etc/motd.txt"),
        *("C:\\secrets.txt", "c:secrets.txt", "\\\\host\\share\\a.txt", "//host/share/a.txt", "", "."),
        *(". ./a.txt", "... /a.txt", "a.txt\0", "a.txt:stream", "leads_out.txt", "folder_out/secrets.txt"),
        *("..", "a//b.txt", "in/"),
    ],
)
def test_a_prompt_file_stays_in_the_input_folder(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input/in").mkdir(parents=True)
    (tmp_path / "secrets.txt").write_text("secret")
    (tmp_path / "input/leads_out.txt").symlink_to(tmp_path / "secrets.txt")
    (tmp_path / "input/folder_out").symlink_to(tmp_path)
    for number in ("_2", "_9"):  # to train on, and held out
        with pytest.raises(UserError, match="outside of ComfyUI's folder input: put it there") as error:
            read(changed(tmp_path, "quickstart", **{number: {"source": source}}))
        assert str(error.value).isprintable()
    (tmp_path / "input/in/mine.txt").write_text("a red circle")
    assert read(changed(tmp_path, "quickstart", _2={"source": "in\\mine.txt"})).data.prompts == "input/in/mine.txt"


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"model": "../secrets"}, "outside of ComfyUI's folder models"),
        ({"model": "/data/model"}, "outside of ComfyUI's folder models"),
        ({"model": "checkpoints/../../secrets"}, "outside of ComfyUI's folder models"),
        ({"model": "owner"}, "not in models/checkpoints"),  # models/owner would be a name on the hub
        ({"model": "loras/a"}, "not in models/checkpoints"),
        ({"start_from": "../../secrets.safetensors"}, "outside of ComfyUI's folder models/loras"),
        ({"start_from": "D:\\a.safetensors"}, "outside of ComfyUI's folder models/loras"),
        ({"start_from": "\\\\host\\a.safetensors"}, "outside of ComfyUI's folder models/loras"),
    ],
)
def test_models_and_loras_stay_in_their_folders(chosen: dict[str, str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        read(changed(tmp_path, "quickstart", _1=chosen))


def test_rewards_in_a_circle_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the rewards are connected in a circle"):
        read(changed(tmp_path, "quickstart", _4={"reward": ["4", 0]}))
    data = json.loads((WORKFLOWS / "api" / "quickstart.json").read_text())
    data["20"] = {"class_type": "DGPO_Reward", "inputs": {"name": "entropy", "weight": 1.0, "reward": ["4", 0]}}
    data["4"]["inputs"]["reward"] = ["20", 0]
    (tmp_path / "w.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="the rewards are connected in a circle"):
        read(tmp_path / "w.json")


QUICKSTART = json.loads((WORKFLOWS / "api" / "quickstart.json").read_text())
WIDGETS = [(id_, name) for id_ in "123456" for name in QUICKSTART[id_]["inputs"]]


@pytest.mark.slow
@pytest.mark.parametrize(("node", "name"), WIDGETS, ids=lambda part: str(part))
def test_whatever_stands_in_a_widget_is_read_or_told(node: str, name: str, tmp_path: Path) -> None:
    texts, links = ["", "x", "\x1b[2J"], [[], [["6", 0]], ["6", 0], ["99", 0], [1, [2]]]
    for value in [None, True, -1, 10**30, 1e400, *texts, *links, {}, {"a": 1}, ...]:
        data = json.loads((WORKFLOWS / "api" / "quickstart.json").read_text())
        if value is ...:
            del data[node]["inputs"][name]
        else:
            data[node]["inputs"][name] = value
        path = tmp_path / "w.json"
        path.write_text(json.dumps(data))
        told = complaint(path)
        assert told.isprintable()
        assert len(told) < 500


def complaint(path: Path) -> str:
    try:
        validate(read(path))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "odd",
    [
        *({"nodes": 3}, {"nodes": [], "links": 3}, {"nodes": [3], "links": []}, {"nodes": {}, "links": []}, 3),
        *("x", None, {"nodes": None}),
        *({"nodes": [{"id": 1, "type": 3}], "links": []}, {"nodes": [{"id": 1, "type": "a"}], "links": [3]}),
        *({"nodes": [{"id": 1, "type": "a", "inputs": [{"name": "x", "link": [1]}]}], "links": []}, {"1": {}}),
        *({"1": {"class_type": 3, "inputs": {}}}, {"1": {"class_type": "a", "inputs": []}}, {"1": None}),
    ],
)
def test_odd_shapes_of_a_workflow_are_told(odd: Any, tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text(json.dumps(odd))
    with pytest.raises(UserError, match="is not a workflow|has no node that trains"):
        training_of(Workflow(tmp_path / "w.json"))


def test_other_nodes_may_look_as_they_like(tmp_path: Path) -> None:
    data = json.loads((WORKFLOWS / "quickstart.json").read_text())
    widget = {"name": "x", "type": "INT", "widget": {"name": "x"}, "link": 9999}
    for id_, values in ((901, None), (902, {"x": 1}), (903, []), (904, [1, 2, 3])):
        data["nodes"].append({"id": id_, "type": "Other", "inputs": [widget], "widgets_values": values})
    data["nodes"].append({"id": 905, "type": "Note", "inputs": None})
    (tmp_path / "w.json").write_text(json.dumps(data))
    assert training_of(Workflow(tmp_path / "w.json")) == training_of(Workflow(WORKFLOWS / "quickstart.json"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * 5000, "nested too deeply"),
        ('{"a": ' * 70 + "1" + "}" * 70, "nested more than 64 levels deep"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"a": "\\ud800"}', "half a character"),
    ],
)
def test_a_file_that_would_take_for_ever_is_told(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(UserError, match=says):
        training_of(Workflow(tmp_path / "w.json"))


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "does not exist"), ("{", "is not valid JSON"), ('{"a": 1}', "is not a workflow"), ("[]", "is not a")],
)
def test_a_file_that_is_no_workflow_is_told(content: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=says):
        training_of(Workflow(path))
