"""Named servers: from the user's own file only, found where it is kept, and told where it is when one is missing."""

import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from judge_server import judges, says

from dgpo_core.common.errors import UserError
from dgpo_core.rewards import make_reward, require_reward
from dgpo_core.rewards.network import endpoints
from dgpo_core.rewards.network.endpoints import Endpoint

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of endpoints of this test."""
    path = tmp_path / "endpoints.yaml"
    monkeypatch.setenv(endpoints.VARIABLE, str(path))
    return path


def test_a_reward_asks_the_endpoint_that_it_names(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    with judges() as judge:
        script = judge(says("7"))
        file.write_text(
            f"j: {{url: '{script.url}', model: big, key_env: JUDGE_KEY, request: {{max_tokens: 9}}}}\n",
            encoding="utf-8",
        )
        reward = make_reward("vlm_judge", {"endpoint": "j"})
        assert reward.score(torch.rand(1, 3, 8, 8), ["a"], [{}]).tolist() == pytest.approx([0.7])
    (asked,), (sent,) = script.asked, script.sent
    assert (asked["model"], asked["max_tokens"], sent["Authorization"]) == ("big", 9, "Bearer sk-1")


def test_the_model_is_the_endpoints_or_where_it_names_none_the_options(file: Path) -> None:
    file.write_text(
        "free: {url: 'http://127.0.0.1:1'}\nbound: {url: 'http://127.0.0.1:1', model: small}\n", encoding="utf-8"
    )
    assert make_reward("vlm_judge", {"endpoint": "free", "model": "any"}).model == "any"
    assert make_reward("vlm_judge", {"endpoint": "bound"}).model == "small"
    with pytest.raises(UserError, match="the endpoint 'bound' is for the model small"):
        make_reward("vlm_judge", {"endpoint": "bound", "model": "dear"})
    with pytest.raises(UserError, match="its option model must be a text"):
        make_reward("vlm_judge", {"endpoint": "free"})


@pytest.mark.parametrize("name", ["remote", "vlm_judge"])
def test_an_unknown_endpoint_says_what_to_write_where(name: str, file: Path) -> None:
    for content in (None, "", "other: {url: 'http://127.0.0.1:1'}"):
        if content is not None:
            file.write_text(content, encoding="utf-8")
        for ask in (make_reward, require_reward):
            with pytest.raises(UserError) as error:
                ask(name, {"endpoint": "mine"})
            told = str(error.value)
            assert f"The reward {name!r}: there is no endpoint 'mine': write a line such as `mine: {{url: " in told
            assert f"into {file} " in told
    with pytest.raises(UserError, match=r"\(did you mean 'other'\?\)"):
        make_reward(name, {"endpoint": "othr"})
    with pytest.raises(UserError, match=f"needs a server: .*into {file}"):
        require_reward(name, {})


def test_either_an_endpoint_or_an_address(file: Path) -> None:
    file.write_text("mine: {url: 'http://127.0.0.1:1'}\n", encoding="utf-8")
    for more in ({"url": "http://127.0.0.1:2"}, {"token_env": "HOME"}):
        with pytest.raises(UserError, match="give either endpoint, which is a name, or url with token_env, not both"):
            make_reward("remote", {"endpoint": "mine", **more})


def test_the_file_is_where_the_variable_says_else_in_comfyuis_folder_else_where_settings_are_kept(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert endpoints.path() == file
    monkeypatch.delenv(endpoints.VARIABLE)
    monkeypatch.setattr(endpoints, "_chosen", [])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert endpoints.path() == tmp_path / ".config/dgpo/endpoints.yaml"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    assert endpoints.path() == tmp_path / "settings/dgpo/endpoints.yaml"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert endpoints.path() == tmp_path / "Library/Application Support/dgpo/endpoints.yaml"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("APPDATA", str(tmp_path / "Roaming"))
    assert endpoints.path() == tmp_path / "Roaming/dgpo/endpoints.yaml"
    endpoints.keep_in(tmp_path / "user/__dgpo/endpoints.yaml")
    assert endpoints.path() == tmp_path / "user/__dgpo/endpoints.yaml"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1]", "must hold lines such as"),
        ("a: 3", "endpoints.yaml: a must have a url"),
        ("a: {model: m}", "a must have a url"),
        ("a: {url: [1]}", "a: url must be a text"),
        ("a: {url: 'http://x', key: sk-1}", "has no key, did you mean key_env?"),
        ("a: {url: 'http://x', request: 3}", "request must be fields and their values"),
        ("a: {url: 'http://x'}\na: {url: 'http://y'}", "a is given twice"),
        ("a: {url: 'ftp://x'}", "url must be the server's address"),
        ("a: {url: 'http://me:secret@x'}", "url must be the server's address"),
        ("a: {url: 'http://x', key_env: UNSET_KEY}", "the environment variable that is to hold its key is not set"),
        ("a: {url: !!python/name:os.system x}", "not valid YAML"),
        ("a: [1", "not valid YAML"),
        ("[" * 1500, "nested"),
    ],
)
def test_what_is_wrong_with_the_file_is_told(content: str, says: str, file: Path) -> None:
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=says) as error:
        require_reward("remote", {"endpoint": "a"})
    assert "secret" not in str(error.value)
    assert "sk-1" not in str(error.value)


@pytest.mark.skipif(os.name != "posix", reason="a matter of mode bits")
def test_a_file_that_anybody_may_change_is_warned_of(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        logging.getLogger(endpoints.__name__), "warning", lambda *words: said.append(words[0] % words[1:])
    )
    file.write_text("mine: {url: 'http://127.0.0.1:1'}\n", encoding="utf-8")
    file.chmod(0o644)
    assert endpoints.find("mine") == Endpoint("http://127.0.0.1:1")
    assert not said
    file.chmod(0o666)
    endpoints.find("mine")
    assert f"may change {file}" in said[0]
