"""Our own reward server and its client, over HTTP on loopback."""

import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import judges, serving
from processes import free_port
from torch import Tensor

from dgpo_core.demo import world
from dgpo_core.errors import UserError
from dgpo_core.rewards import Reward, make_reward, wire
from dgpo_core.rewards.remote import batches
from dgpo_core.rewards.serve import RewardServer, main


class Odd(Reward):
    """Fails as the prompt says; else counts how many score at once."""

    busy = 0

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        self.busy += 1
        time.sleep(0.02)
        together, self.busy = self.busy, self.busy - 1
        if prompts[0] == "crash":
            raise RuntimeError("No such thing.")
        if prompts[0] == "mistake":
            raise UserError("This cannot be scored.")
        return torch.full((len(images),), float("nan") if prompts[0] == "nan" else together)


@contextmanager
def reward_server(reward: Reward, **options: Any) -> Iterator[str]:
    with serving(RewardServer("odd", reward, "127.0.0.1", 0, **options)) as url:
        yield url


def score(url: str, images: Tensor, prompts: Sequence[str], metadata: Any = None, **options: Any) -> Tensor:
    reward = make_reward("remote", {"url": url, "backoff": 0.01, "retries": 1, **options})
    return reward.score(images, prompts, metadata or [{}] * len(prompts))


def post(url: str, body: bytes, path: str = "/score", kind: str = wire.KIND, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request("POST", path, body, {"Content-Type": kind, **headers})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())["error"]
    connection.close()
    return found


def test_the_command_scores_as_the_reward_does_here(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dgpo_core.rewards.serve", "--reward", "shapes_graded", "--port", "0"]
    environment = {**os.environ, "TOKEN": "t0ken", "PYTHONPATH": str(Path(world.__file__).parents[2])}
    command += ["--token-env", "TOKEN", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    try:
        line = process.stdout.readline()
        url = re.fullmatch(r"The reward 'shapes_graded' is at (http://127\.0\.0\.1:\d+); Ctrl-C stops it\.\n", line)[1]
        scenes, images = pictures(10)
        prompts, metadata = [s.prompt() for s in scenes], [s.metadata() for s in scenes]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TOKEN_HERE", "t0ken")
            found = score(url, images, prompts, metadata, token_env="TOKEN_HERE", batch=4)
        expected = make_reward("shapes_graded").score(images, prompts, metadata)
        assert torch.equal(found, expected)
        assert expected.std() > 0
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout.read() == "Stopped.\n"
    finally:
        process.kill()
        process.wait()


def pictures(count: int) -> tuple[list[world.Scene], Tensor]:
    """Scenes, every second one not that of its picture."""
    rng, table = random.Random(3), world.by_category()
    scenes = [rng.choice(table[world.CATEGORIES[i % 5]]) for i in range(count)]
    drawn = [world.draw(world.place(scene, rng), rng).picture for scene in scenes]
    shown = [world.mislabel(scene, rng) if i % 2 else scene for i, scene in enumerate(scenes)]
    return shown, torch.stack([torch.from_numpy(p) for p in drawn]).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("name", ["entropy", "jpeg_size", "group_diversity"])
def test_scores_are_those_of_the_rounded_images(name: str) -> None:
    images, prompts = torch.rand(9, 3, 16, 24), ["a"] * 4 + ["ü"] * 2 + ["a"] * 3
    with reward_server(make_reward(name)) as url:
        found = score(url, images, prompts, batch=3)
        assert score(url, images[:0], []).shape == (0,)
    rounded = (images * 255).round() / 255
    assert torch.equal(found, make_reward(name).score(rounded, prompts, [{}] * 9))


def test_groups_stay_whole() -> None:
    assert batches(["a", "a", "b", "c", "c", "c", "d"], 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert batches(["a"] * 5 + ["b"], 2) == [slice(0, 5), slice(5, 6)]
    assert batches([], 2) == []


def test_health_and_one_at_a_time() -> None:
    with reward_server(Odd()) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read()) == {"reward": "odd"}
        connection.close()
        found: list[Tensor] = []
        ask = [
            threading.Thread(target=lambda: found.append(score(url, torch.rand(1, 3, 4, 4), ["a"]))) for _ in range(4)
        ]
        [t.start() for t in ask]
        [t.join() for t in ask]
        assert torch.cat(found).tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("mistake", r"sample 1 \('mistake'\): the server \S+ answered 422 \(This cannot be scored\)\."),
        ("crash", r"in 2 tries: .* answered 500 \(The reward 'odd' failed with RuntimeError: no such thing\)\."),
        ("nan", r"answered 422 \(Reward 'odd' returned nan for sample 0 \('nan'\): it must be a number\)\."),
    ],
)
def test_what_the_reward_says_is_passed_on(prompt: str, told: str) -> None:
    with reward_server(Odd()) as url, pytest.raises(UserError, match=f"The reward 'remote': no score for .*{told}"):
        score(url, torch.rand(2, 3, 4, 4), ["a", prompt], batch=1)


def test_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRONG", "abc")
    with reward_server(make_reward("brightness"), token="t0ken") as url:
        for token_env in ("WRONG", ""):
            with pytest.raises(UserError, match=r"answered 401 \(The token is missing or wrong\)\."):
                score(url, torch.rand(1, 3, 512, 512), ["a"], token_env=token_env)
        monkeypatch.setenv("RIGHT", "t0ken")
        assert score(url, torch.ones(1, 3, 4, 4), ["a"], token_env="RIGHT").tolist() == pytest.approx([1])


def test_too_large() -> None:
    with reward_server(make_reward("brightness"), limit=2**20) as url:
        told = (
            r"answered 413 \(The request is larger than 1 MB: send smaller batches, or raise the server's --limit_mb\)"
        )
        with pytest.raises(UserError, match=told):
            score(url, torch.rand(8, 3, 512, 512), ["a"] * 8)


def test_bad_requests() -> None:
    good = wire.pack(torch.rand(2, 3, 4, 4), ["a", "b"], [{}, {}])
    bodies = [
        (b"hello", "not a safetensors file"),
        (good[:-1], "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (wire.save({"images": torch.rand(2, 3, 4, 4)}), "uint8"),
        (wire.save({"other": torch.zeros(1)}), "uint8"),
        (wire.save({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}), '"prompts", a JSON list of texts'),
        (wire.save({"images": torch.zeros(1, 3, 4, 4).byte()}, {"prompts": '["a"]', "metadata": "[1]"}), "of objects"),
        (wire.pack(torch.rand(2, 3, 4, 4), ["a"], [{}, {}]), "2 images, 1 prompts and 2 metadata"),
        (b"", "no body"),
    ]
    with reward_server(make_reward("brightness")) as url:
        for body, problem in bodies:
            status, said = post(url, body)
            assert status == 400
            assert problem in said
        assert post(url, good, kind="text/plain") == (400, "The content type must be application/octet-stream.")
        assert post(url, good, path="/other")[0] == 404


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"<html>", "did not answer with scores: is it `python -m dgpo_core.rewards.serve`?"),
        ({"scores": [1.0]}, "did not answer with 2 numbers"),
        ({"scores": [1.0, None]}, "did not answer with 2 numbers"),
        ({"scores": 3}, "did not answer with 2 numbers"),
    ],
)
def test_answers_that_are_no_scores(answer: Any, told: str) -> None:
    with judges() as start, pytest.raises(UserError) as error:
        score(start((200, answer)).url, torch.rand(2, 3, 4, 4), ["a", "b"])
    assert told in str(error.value)


def test_a_port_that_is_taken_and_an_address_for_others() -> None:
    with reward_server(Odd()) as url, pytest.raises(UserError, match="Cannot listen on .*: address already in use"):
        RewardServer("odd", Odd(), "127.0.0.1", int(url.rpartition(":")[2]))
    with RewardServer("odd", Odd(), "0.0.0.0", 0, token="t0ken") as server:
        assert server.url.startswith("http://0.0.0.0:")


def test_other_servers_are_noticed() -> None:
    with reward_server(make_reward("brightness")) as url, pytest.raises(UserError, match="answered 404"):
        score(f"{url}/v1", torch.rand(1, 3, 4, 4), ["a"])
    with pytest.raises(UserError, match=r"'remote': no score for samples 0 to 1 \('a', ...\).*connection refused"):
        score(f"http://127.0.0.1:{free_port()}", torch.rand(2, 3, 4, 4), ["a", "b"])
    with pytest.raises(UserError, match="the metadata of the prompt 'a' cannot be sent"):
        score("http://127.0.0.1:1", torch.rand(1, 3, 4, 4), ["a"], [{"x": {1, 2}}])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--host", "0.0.0.0"],
            "Other machines can reach 0.0.0.0: name a token's environment variable with --token_env.",
        ),
        (["--token-env", "UNSET_TOKEN"], "--token_env: the environment variable"),
        (["--port", "99999"], "--port is 99999 but must be 0 to 65535."),
        (["--host", "no.such.host.invalid"], "Cannot listen on no.such.host.invalid, port 8000: "),
        (["--options", "{"], "--options is not valid JSON"),
        (["--options", "[1]"], "--options must be an object"),
        (["--options", '{"x": 1}'], "does not take these options"),
        (["--limit_mb", "0"], "--limit_mb is 0"),
        (["--reward", "brigtness"], "did you mean 'brightness'"),
    ],
)
def test_what_the_command_refuses(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    reward = [] if "--reward" in arguments else ["--reward", "brightness"]
    assert main([*reward, "--device", "cpu", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line
