import inspect
import re
import typing
from dataclasses import fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from dgpo_core.common.errors import UserError
from dgpo_core.runs.options import parse_args
from dgpo_core.settings.config import Config, Range, RewardTerm, show_number
from dgpo_core.settings.presets import load_preset, preset_names
from dgpo_core.settings.resuming import differences, fingerprint
from dgpo_core.settings.schema import setting_types
from dgpo_core.settings.validation import validate
from dgpo_core.settings.values import from_dict
from dgpo_core.settings.yaml_file import load_yaml, to_yaml

PRESETS = [
    "quickstart",
    "quickstart-edits",
    "sd35m-geneval-curve",
    "sd35m-geneval-safe",
    "sd35m-ocr-curve",
    "sd35m-ocr-safe",
    "sd35m-pickscore-curve",
    "sd35m-pickscore-safe",
    "sd15-pickscore",
    "sdxl-pickscore",
    "flux-pickscore",
    "chroma-pickscore",
    "flux2-klein-pickscore",
    "qwenimage-pickscore",
    "sana-pickscore",
    "hidream-pickscore",
    "zimage-pickscore",
    "zimage-turbo-pickscore",
    *("flux", "sd15", "sd21", "sd35m", "sdxl", "sdxl-vpred", "wan", "zimage"),
]


def _source(name: str) -> str:
    return files("dgpo_core.settings").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")


# --- presets ---------------------------------------------------------------------------------------------------------


def test_the_presets_are_these() -> None:
    assert preset_names() == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_valid_and_names_its_source(name: str) -> None:
    assert re.match(r"# Source: \S.{20,}", _source(name))
    config = load_preset(name)
    assert config.name == name
    if name.startswith("quickstart"):  # what it is made of ships
        validate(config)
        return
    with pytest.raises(UserError, match="give --data.prompts FILE"):
        validate(config)
    validate(replace(config, data=replace(config.data, prompts="mine.txt")))


@pytest.mark.parametrize("task", ["geneval", "ocr", "pickscore"])
def test_safe_holds_the_model_closer_than_curve(task: str) -> None:
    safe, curve = (load_preset(f"sd35m-{task}-{variant}").training for variant in ("safe", "curve"))
    assert safe.kl_weight > curve.kl_weight
    assert safe.beta > curve.beta


@pytest.mark.parametrize("variant", ["curve", "safe"])
def test_the_geneval_presets_train_the_graded_score_and_report_the_strict_one(variant: str) -> None:
    config = load_preset(f"sd35m-geneval-{variant}")
    assert config.reward == (RewardTerm("geneval_training"),)
    assert config.evaluation.reward == "geneval"


@pytest.mark.parametrize("task", ["geneval", "ocr"])
@pytest.mark.parametrize("variant", ["curve", "safe"])
def test_presets_whose_reward_checks_facts_say_how_to_get_prompts(task: str, variant: str) -> None:
    assert f"# python -m dgpo_core.prompts {task} --count " in _source(f"sd35m-{task}-{variant}")


@pytest.mark.parametrize(
    ("mode", "rollout_cfg", "kl_cfg", "reference", "betas"),
    [
        ("1", 4.5, 1.0, "frozen", (10, 100)),
        ("2a", 1.0, 4.5, "frozen", (10, 100)),
        ("2b", 1.0, 1.0, "old", (2000, 5000)),
    ],
)
def test_mode_sets_what_the_official_readme_says(
    mode: str, rollout_cfg: float, kl_cfg: float, reference: str, betas: tuple[float, float]
) -> None:
    assert _source(f"modes/mode-{mode}").startswith("# Source: ")
    config = parse_args(["--preset", "sd35m-ocr-curve", "--mode", mode, "--data.prompts", "mine.txt"])
    assert config.rollout.cfg == config.evaluation.cfg == rollout_cfg
    assert config.training.kl_cfg == kl_cfg
    assert config.training.reference == reference
    assert betas[0] <= config.training.beta <= betas[1]
    assert 0 < config.training.clip <= (1e-2 if mode == "1" else 1e-4)
    assert config.model.path == "stabilityai/stable-diffusion-3.5-medium"


# --- YAML ------------------------------------------------------------------------------------------------------------


def test_a_resolved_file_reads_back_the_same(tmp_path: Path) -> None:
    config = parse_args(
        ["--training.lr", "1e-5", "--reward", "pickscore=1.5,ocr", "--lora.targets", "to_q", "to_k", "--name", "grün"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_yaml(path) == config


def test_reward_options_survive(tmp_path: Path) -> None:
    term = RewardTerm("vlm", 0.5, {"url": "http://localhost:8000", "retries": 3, "nested": {"a": [1, 2]}})
    config = replace(Config(), reward=(term, RewardTerm("ocr")))
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    "text", ["reward: a=1.0,b=0.5", "reward: {a: 1, b: 0.5}", "reward: [a, {name: b, weight: 5e-1}]"]
)
def test_ways_to_write_rewards(text: str) -> None:
    assert from_dict(yaml.safe_load(text)).reward == (RewardTerm("a", 1.0), RewardTerm("b", 0.5))


def test_numbers_that_yaml_takes_for_text() -> None:
    assert from_dict(yaml.safe_load("training: {lr: 1e-3, beta: 10}")).training.lr == 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {learning_rat: 1}", r"no setting training.learning_rat\b"),
        ("training: {ema_fast: 1}", "no setting training.ema_fast, did you mean training.ema_fast_max?"),
        ("lr: 1", "no setting lr, did you mean training.lr?"),
        ("batch: 1", "did you mean rollout.batch or evaluation.batch?"),
        ("training: 3", "training must hold 'name: value' lines, not 3"),
        ("[1, 2]", "the file must hold 'name: value' lines"),
        ("training: {lr: fast}", "training.lr must be a number, not 'fast'"),
        ("training: {lr: true}", "training.lr must be a number, not True"),
        ("iterations: 2.5", "iterations must be a whole number, not 2.5"),
        ("iterations: true", "iterations must be a whole number, not True"),
        ("memory: {compile: 1}", "memory.compile must be true or false, not 1"),
        ("name: 12", "name must be text"),
        ("lora: {targets: to_q}", "lora.targets must be a list"),
        ("training: {betas: [0.9]}", "training.betas must hold 2 values, not 1"),
        ("training: {reference: base}", "training.reference must be one of frozen, old, not 'base'"),
        ("reward: 3", "reward must be NAME=WEIGHT,... or a list"),
        ("reward: [{nam: a}]", "give each reward a name"),
        ("reward: [{name: a, wieght: 2}]", "a reward has no wieght, did you mean weight?"),
        ("reward: [{name: a, options: 3}]", "the options of a must be"),
        ("reward: [{name: a, weight: heavy}]", "the weight of a must be a number"),
        ("training: {lr: 1", "not valid YAML: .* in line 1"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_yaml(path)
    assert str(path) in str(caught.value)
    assert re.search(message.replace("?", r"\?"), str(caught.value))


# --- the command line ------------------------------------------------------------------------------------------------


def test_no_arguments_are_the_quickstart() -> None:
    assert parse_args([]) == load_preset("quickstart")


def test_later_layers_win(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: {lr: 0.5, beta: 7}\nseed: 4\niterations: 9")
    config = parse_args(["--preset", "quickstart", "--config", str(path), "--mode", "2b", "--training.lr=0.25"])
    quickstart = load_preset("quickstart")
    assert config.lora == quickstart.lora  # preset
    assert (config.seed, config.iterations) == (4, 9)  # file over preset
    assert config.training.beta == 2000  # mode over file
    assert config.training.lr == 0.25  # option over all
    assert config.name == "quickstart"


def test_a_file_alone_starts_from_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 4")
    assert parse_args(["--config", str(path)]) == replace(Config(), seed=4, name="mine")


def test_resume_takes_the_settings_of_its_run(tmp_path: Path) -> None:
    saved = replace(parse_args(["--training.lr", "0.5"]), name="mine", output="where it was before")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(to_yaml(saved))
    config = parse_args(["--resume", "--name", "mine", "--output", str(tmp_path), "--iterations", "77"])
    assert config == replace(saved, output=str(tmp_path), resume=True, iterations=77)


def test_options_take_dashes_and_negations() -> None:
    config = parse_args(["--rollout.group-size", "8", "--memory.no-offload", "--seed", "-1", "--resume"])
    assert (config.rollout.group_size, config.memory.offload, config.seed, config.resume) == (8, False, -1, True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--training.lrr", "1"], "no option --training.lrr, did you mean --training.lr?"),
        (["--lr", "1"], "no option --lr, did you mean --training.lr?"),
        (["--preset", "quikstart"], "no preset quikstart, did you mean quickstart?"),
        (["--preset"], "--preset"),
        (["--mode", "3"], "no mode 3; known: 1, 2a, 2b."),
        (["--seed", "x"], "--seed.*'x'"),
        (["--training.reference", "base"], "Invalid choice 'base'.*--training.reference.*frozen"),
        (["--training.betas", "0.9"], "--training.betas"),
        (["--reward", "pickscore=high"], "the weight of pickscore must be a number"),
        (["stray"], "stray"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_told(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_args(argv)
    assert re.search(message.replace("?", r"\?"), str(caught.value))
    assert "\n" not in str(caught.value)


def test_help_shows_every_setting_and_preset(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    help_text = capsys.readouterr().out
    for name in (*setting_types(), "preset", "mode", "config"):
        assert f"--{name}" in help_text
    for preset in PRESETS:
        assert preset in help_text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "measured", "held_out", "watch"),
    [
        ([], "shapes", "embedded", []),
        (["--reward", "shapes"], "shapes", "embedded", []),
        (["--reward", "human"], "shapes", "embedded", []),
        (["--reward", "brightness"], "", "embedded", ["shapes"]),
        (["--reward", "brightness", "--watch", "entropy"], "", "embedded", ["entropy"]),
        (["--reward", "brightness", "--evaluation.reward", "shapes"], "shapes", "embedded", []),
        (["--model.path", "my/model", "--reward", "pickscore"], "", "embedded", []),
        (["--groups", "art"], "shapes", "embedded", []),
        (["--groups", "art", "--reward", "ratings"], "shapes", "embedded", []),
        (["--groups", "art", "--model.path", "my/model"], "", "", []),
        (["--model.path", "my/model", "--data.prompts", "my.txt", "--reward", "pickscore"], "", "", []),
        (["--data.prompts", "my.txt", "--data.held-out", "other.txt"], "", "other.txt", []),
        (["--preset", "quickstart", "--reward", "brightness"], "shapes", "embedded", []),
    ],
)
def test_what_the_quickstart_measures_by_is_not_left_beside_what_is_the_users_own(
    argv: list[str], measured: str, held_out: str, watch: list[str]
) -> None:
    config = parse_args(argv)
    assert (config.evaluation.reward, config.data.held_out) == (measured, held_out)
    assert [term.name for term in config.watch] == watch


# --- ranges ----------------------------------------------------------------------------------------------------------


def _numbers() -> list[tuple[str, float]]:
    """Every number of the settings with a value just outside of each end of its range."""
    outside = []
    for name, hint in setting_types().items():
        for allowed in getattr(hint, "__metadata__", ()):
            if isinstance(allowed, Range):
                outside.append((name, allowed.low if allowed.open_low else allowed.low - 1))
                if allowed.high != float("inf"):
                    outside.append((name, allowed.high if allowed.open_high else allowed.high + 1))
    return outside


def _with(config: Config, name: str, value: Any) -> Config:
    group, _, leaf = name.rpartition(".")
    if not group:
        return replace(config, **{leaf: value})
    return replace(config, **{group: replace(getattr(config, group), **{leaf: value})})


@pytest.mark.parametrize(("name", "value"), _numbers())
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    config = Config()
    wrong = (value, value) if name == "training.betas" else value
    with pytest.raises(UserError, match=rf"{re.escape(name)} is {show_number(value)} but must be (at|greater|less)"):
        validate(_with(config, name, wrong))


def test_numbers_all_have_a_range() -> None:
    free = [name for name, hint in setting_types().items() if hint in (int, float)]
    assert free == []


def test_every_whole_number_has_a_highest_value_that_a_sentence_names() -> None:
    """10**18 of anything would be a crash, or nothing happening for years."""
    for name, hint in setting_types().items():
        if typing.get_origin(hint) is typing.Annotated and typing.get_args(hint)[0] is int:
            with pytest.raises(UserError, match=rf"{re.escape(name)} is 1000000000000000000000 but .*at most \d"):
                validate(_with(Config(), name, 10**21))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.lr": float("nan")}, "training.lr is nan"),
        ({"training.beta": float("inf")}, "training.beta is inf"),
        ({"rollout.group_size": 1}, "nothing to be compared with"),
        ({"training.t_min": 2.5}, "training.t_min is 2.5 but must be a noise level below 1 or a whole number"),
        ({"training.t_min": 11.0}, "at most rollout.steps"),
        ({"training.timestep_source": "uniform"}, "it must be a noise level below 1"),
        ({"training.timesteps": 8}, "only 7 roll-out steps may be trained on"),
        ({"rollout.steps": 3, "training.t_min": 0.2}, "only 3 roll-out steps may be trained on"),
        ({"model.height": 500}, "model.height is 500 but must be a multiple of 8"),
        ({"reward": ()}, "There is no reward"),
        ({"reward": (RewardTerm("a"), RewardTerm("a"))}, "a is given more than once"),
        ({"reward": (RewardTerm("a", 0.0),)}, "must be a number other than 0"),
        ({"reward": (RewardTerm("a", float("nan")),)}, "must be a number other than 0"),
        ({"data.prompts": ""}, "give --data.prompts FILE"),
        ({"name": "a/b"}, "cannot be a folder name"),
        ({"name": ".."}, "cannot be a folder name"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    config = Config()
    for name, value in changes.items():
        config = _with(config, name, value)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_the_defaults_are_valid() -> None:
    validate(Config())


def test_every_setting_is_documented() -> None:
    source = Path(inspect.getfile(Config)).read_text(encoding="utf-8")

    def check(group: type) -> None:
        for field in fields(group):
            if is_dataclass(field.type):
                check(field.type)
            else:
                assert re.search(rf'\n    {field.name}: [^\n]*\n    """\S', source), field.name

    check(Config)


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["training.lr", "seed", "model.path", "data.groups_per_iteration", "rollout.solver"])
def test_a_resumed_run_may_not_change(name: str) -> None:
    old = Config()
    value = {"model.path": "other", "rollout.solver": "euler"}.get(name, 3)
    new = _with(old, name, value)
    assert list(differences(old, new)) == [name]
    assert fingerprint(old) != fingerprint(new)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iterations", 5000),
        ("output", "elsewhere"),
        ("resume", True),
        ("checkpoint.every", 1),
        ("memory.offload", False),
    ],
)
def test_a_resumed_run_may_change(name: str, value: Any) -> None:
    old = Config()
    new = _with(old, name, value)
    assert not differences(old, new)
    assert fingerprint(old) == fingerprint(new)


def test_changed_rewards_are_seen() -> None:
    old = Config()
    new = replace(old, reward=(RewardTerm("shapes_graded", 1.0, {"strict": True}),))
    assert list(differences(old, new)) == ["reward"]
