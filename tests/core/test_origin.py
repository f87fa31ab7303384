"""What a LoRA file says of its making gives nothing away, and decides nothing for whoever measures it."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dgpo_core import evaluate
from dgpo_core.common.errors import UserError
from dgpo_core.evaluation import report
from dgpo_core.policy import load_policy
from dgpo_core.runs import origin
from dgpo_core.settings.config import EMBEDDED, Config, RewardTerm
from dgpo_core.settings.presets import load_preset, preset_names
from dgpo_core.settings.schema import setting_types
from dgpo_core.settings.shipped import HELD_OUT
from dgpo_core.settings.yaml_file import to_yaml

DEMO = Path(origin.__file__).parents[1] / "demo" / "model"
MARK = "s3cret"
QUICKSTART = load_preset("quickstart")


# --- written ---------------------------------------------------------------------------------------------------------


def marked() -> Config:
    """Settings in which every text that a user may choose holds the mark."""
    config = QUICKSTART
    for name, hint in setting_types().items():
        if hint is not str and hint != tuple[str, ...]:
            continue
        text = f"/home/{MARK}/http://{MARK}:8080"
        group, _, leaf = name.rpartition(".")
        value = text if hint is str else (text,)
        part = getattr(config, group) if group else config
        changed = replace(part, **{leaf: value})
        config = replace(config, **{group: changed}) if group else changed
    terms = (
        RewardTerm("remote", 2.0, {"url": f"http://{MARK}", "token_env": MARK, "endpoint": MARK}),
        RewardTerm(f"/home/{MARK}/mine.py:Reward", 1.0),
        RewardTerm("ocr", 1.0, {"path": MARK}, f"/home/{MARK}/mine.py:Reward > 0.5"),
        RewardTerm(f"plugin_{MARK}", 1.0),
    )
    return replace(config, reward=terms, watch=(RewardTerm(f"/{MARK}.py:W", options={"a": MARK}),))


def test_a_file_gives_away_no_path_address_prompt_option_or_variable() -> None:
    config = replace(marked(), model=replace(QUICKSTART.model, path=f"/home/{MARK}/models/sd3.safetensors"))
    told = origin.describe(config, 7)
    assert MARK not in json.dumps(told)
    assert "/" not in json.dumps(told)
    assert "://" not in json.dumps(told)
    assert told["dgpo.base"] == "sd3.safetensors"
    assert told["dgpo.rewards"] == "remote=2,other=1,ocr=1?other > 0.5,other=1"
    assert told["dgpo.step"] == "7"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (EMBEDDED, EMBEDDED), ("/home/me/sd3", "sd3"), ("C:\\Users\\me\\sd3.safetensors", "sd3.safetensors"),
        ("stabilityai/sd3/", "sd3"), ("https://me:key@host/a/sd3?token=x#y", "sd3"), ("", ""),
    ],
)  # fmt: skip
def test_of_the_base_its_name_is_told(path: str, name: str) -> None:
    assert origin.base_name(path) == name


def test_numbers_and_choices_are_told() -> None:
    settings = json.loads(origin.describe(QUICKSTART, 80)["dgpo.config"])
    assert settings["training"]["lr"] == 1e-3
    assert settings["training"]["reference"] == "frozen"
    assert settings["rollout"]["solver"] == "euler"
    assert origin.describe(replace(QUICKSTART, name="quickstart"), 80)["dgpo.preset"] == "quickstart"
    assert "dgpo.preset" not in origin.describe(replace(QUICKSTART, name="mine"), 80)


@pytest.mark.parametrize("name", preset_names())
def test_what_is_written_is_read_back(name: str) -> None:
    config = load_preset(name)
    found = origin.read(Path("x"), origin.describe(config, 5))
    assert found.step == 5
    assert found.base == origin.base_name(config.model.path)
    assert found.held_out == (config.data.held_out if config.data.held_out in HELD_OUT else "")
    e = config.evaluation
    assert found.config.evaluation == replace(type(e)(), solver=e.solver, steps=e.steps, cfg=e.cfg, batch=e.batch)
    assert set(found.measured) == ({e.reward} if e.reward else {term.name for term in config.reward})


# --- read ------------------------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "is not valid JSON"),
    "list": ([], "must be an object of settings"),
    "text": ("hello", "is not valid JSON"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "group": ({"model": 3}, "model must be a group of settings"),
    "path": ({"model": {"path": 3}}, "model.path must be a text"),
    "steps": ({"evaluation": {"steps": "many"}}, "evaluation.steps must be a whole number"),
    "absurd steps": ({"evaluation": {"steps": 10**18}}, "evaluation.steps is .* but must be"),
    "absurd size": ({"model": {"height": 10**9}}, "model.height is .* but must be"),
    "NaN": ('{"reward": [{"name": "shapes"}], "evaluation": {"cfg": NaN}}', "evaluation.cfg is nan|not valid JSON"),
    "solver": ({"rollout": {"solver": "http://x/"}}, "which names no solver"),
    "rewards": ({"reward": "remote"}, "reward must be a list of rewards"),
    "no rewards": ({"reward": []}, "reward must be a list of rewards"),
    "reward": ({"reward": ["shapes"]}, "must be an object with a name"),
    "name": ({"reward": [{"name": ["shapes"]}]}, "the name of a reward must be a text"),
    "weight": ({"reward": [{"name": "shapes", "weight": "x"}]}, "the weight of a reward must be a number"),
    "measure": ({"evaluation": {"reward": {"a": 1}}}, "evaluation.reward must be a text"),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_settings_that_cannot_be_are_one_sentence(name: str) -> None:
    change, says = CHANGES[name]
    text = change if isinstance(change, str) else json.dumps(change)
    with pytest.raises(UserError, match=says):
        origin.read(Path("x"), {"dgpo.config": text})


@pytest.mark.parametrize("text", ["x", "", "-1", "1e3", "9" * 5000, "٣"])
def test_a_step_that_is_no_number_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match=r"dgpo\.step .* must be a whole number"):
        origin.read(Path("x"), {**origin.describe(QUICKSTART, 1), "dgpo.step": text})


def test_settings_of_a_later_version_are_passed_over() -> None:
    told = origin.describe(QUICKSTART, 1)
    settings = json.loads(told["dgpo.config"])
    settings |= {"quantum": {"a": 1}, "model": {**settings["model"], "b": []}}
    settings["reward"][0]["c"] = "d"
    again = origin.read(Path("x"), {**told, "dgpo.config": json.dumps(settings)})
    assert again == origin.read(Path("x"), told)


# --- measured --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the embedded model, as the quickstart writes it."""
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    policy = load_policy(DEMO, rank=2, dtype="float32")
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.01)
    policy.save_lora(path, origin.describe(QUICKSTART, 80))
    return path


@pytest.fixture
def sink() -> Iterator[tuple[str, list[str]]]:
    """A server's address, and what it has been sent."""
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def _note(self) -> None:
            seen.append(f"{self.command} {self.path} {self.headers}")
            self.send_response(200)
            self.end_headers()

        do_GET = do_POST = do_HEAD = _note

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def changed(lora: Path, folder: Path, **changes: Any) -> Path:
    """The LoRA with other settings in its header: groups are laid over, all else is put in."""
    with safe_open(lora, framework="pt") as file:
        metadata = dict(file.metadata())
    settings = json.loads(metadata["dgpo.config"])
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(value, Mapping) else value
    save_file(load_file(lora), folder / "x.safetensors", {**metadata, "dgpo.config": json.dumps(settings)})
    return folder / "x.safetensors"


@pytest.mark.slow
def test_the_quickstarts_file_is_enough_by_itself(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--lora", str(lora), "--images", "2", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    plan, _, table = told.partition("base: 2 images")
    assert "This will be run:" in plan
    for line in ("model    embedded (from ", "prompts  embedded (from ", "rewards  shapes (from ", "euler, 8 steps"):
        assert line in plan
    assert "shapes" in table


@pytest.mark.slow
def test_a_file_sends_nothing_and_runs_nothing(
    lora: Path,
    tmp_path: Path,
    sink: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, seen = sink
    monkeypatch.setenv("MY_KEY", MARK)
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    options = {"url": url, "token_env": "MY_KEY", "key_env": "MY_KEY", "model": "m", "endpoint": url}
    for name in ("remote", "vlm_judge", f"{tmp_path / 'evil.py'}:X", "human", "other", "no_such_reward"):
        term = {"name": name, "weight": 1.0, "options": options, "only_if": ""}
        for path in (
            changed(lora, tmp_path, reward=[term], evaluation={"reward": ""}),
            changed(lora, tmp_path, evaluation={"reward": name}, watch=[term]),
        ):
            assert evaluate.main(["--lora", str(path), "--images", "2", "--device", "cpu"]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert "--reward" in error
    watched = changed(lora, tmp_path, watch=[{"name": "remote", "weight": 1.0, "options": options}])
    assert evaluate.main(["--lora", str(watched), "--images", "2", "--device", "cpu"]) == 0
    assert not seen
    assert not ran.exists()


def test_a_reward_of_a_file_gets_no_options(lora: Path, tmp_path: Path) -> None:
    term = {"name": "shapes", "weight": 1.0, "options": {"path": "/etc/passwd"}}
    path = changed(lora, tmp_path, reward=[term])
    planned = evaluate.plan(evaluate.read_adapters(evaluate.EvaluateConfig((path,))), evaluate.EvaluateConfig((path,)))
    assert not planned.options


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {"held_out": "/etc/passwd"}}, "give some with --prompts FILE"),
        ({"data": {"held_out_text": "a text"}}, "give some with --prompts FILE"),
        ({"model": {"path": "/home/me/model"}}, r"was trained on model, and does not say where that lies: .* --model"),
        ({"model": {"path": ""}}, "a model that it does not name"),
        (
            {"model": {"few_step_lora": "/home/me/turbo"}},
            "a few-step LoRA merged into it, and does not say which: .* --config",
        ),
    ],
)
def test_a_file_names_no_prompts_and_no_model_but_those_that_ship(
    changes: dict[str, Any], says: str, lora: Path, tmp_path: Path
) -> None:
    options = evaluate.EvaluateConfig((changed(lora, tmp_path, **changes),))
    with pytest.raises(UserError, match=says):
        evaluate.plan(evaluate.read_adapters(options), options)


def test_a_few_step_lora_that_ships_is_part_of_the_base_again_and_any_other_is_not_named(
    lora: Path, tmp_path: Path
) -> None:
    shipped, other = (
        replace(QUICKSTART, model=replace(QUICKSTART.model, few_step_lora=name)) for name in (EMBEDDED, "my/turbo.sft")
    )
    told = [json.loads(origin.describe(config, 1)["dgpo.config"])["model"] for config in (QUICKSTART, shipped, other)]
    assert [model.get("few_step_lora") for model in told] == [None, EMBEDDED, origin.OTHER]
    options = evaluate.EvaluateConfig((changed(lora, tmp_path, model={"few_step_lora": EMBEDDED}),))
    planned = evaluate.plan(evaluate.read_adapters(options), options)
    assert planned.config.model.few_step_lora == EMBEDDED
    assert "with the few-step LoRA embedded" in str(planned)


def test_settings_of_ones_own_may_name_anything_but_code(lora: Path, tmp_path: Path) -> None:
    term = RewardTerm("remote", 1.0, {"url": "http://mine"})
    own = replace(QUICKSTART, reward=(term,), evaluation=replace(QUICKSTART.evaluation, reward=""))
    (tmp_path / "my.yaml").write_text(to_yaml(own))
    options = evaluate.EvaluateConfig((lora,), config=tmp_path / "my.yaml")
    planned = evaluate.plan(evaluate.read_adapters(options), options)
    assert planned.options["remote"]["url"] == "http://mine"
    assert "rewards  remote (from " in str(planned)
    assert "Server that is asked: http://mine" in str(planned)
    code = replace(own, reward=(RewardTerm("my.py:X"),))
    (tmp_path / "my.yaml").write_text(to_yaml(code))
    with pytest.raises(UserError, match=r"names the Python file of a reward \(my.py:X\), which is not run"):
        evaluate.plan(evaluate.read_adapters(options), options)


# --- shown -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["<script>x</script>", "[a](http://b)", "![a](http://b)", "a|b", "`x`", "**x**", "__x__", "# x", "www.a.b", "&lt;",
     "a\nb", "x\x1b[2J", "http://a.b", "~~x~~", "me@a.b", "a\\"],
)  # fmt: skip
def test_a_report_shows_what_comes_from_outside_and_does_nothing_with_it(text: str) -> None:
    found = report.escaped(text)
    assert found.isprintable()
    assert "<" not in found
    marks = [found[i - 1 : i + 1] for i, c in enumerate(found) if c in "[]()!|`*_#.:~@"]
    assert all(mark.startswith("\\") for mark in marks)
