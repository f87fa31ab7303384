"""Our own reward server and its client, over HTTP on loopback."""

import http.client
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import judges, serving
from processes import free_port
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.demo import world
from dgpo_core.rewards import Reward, make_reward
from dgpo_core.rewards.network import wire
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
        if prompts[0] == "leave":
            sys.exit("Enough.")
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


@contextmanager
def command(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server as a process of its own, and its address."""
    argv = [sys.executable, "-m", "dgpo_core.rewards.serve", "--reward", "shapes_graded", "--port", "0", *arguments]
    environment = {**os.environ, "TOKEN": "t0ken", "PYTHONPATH": str(Path(world.__file__).parents[2])}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*argv, "--device", "cpu"], cwd=folder, env=environment, **output)
    try:
        line = process.stdout.readline()
        yield (
            process,
            re.fullmatch(r"The reward 'shapes_graded' is at (http://127\.0\.0\.1:\d+); Ctrl-C stops it\.\n", line)[1],
        )
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.processes
def test_the_command_scores_as_the_reward_does_here_and_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    with command(tmp_path, "--token-env", "TOKEN") as (process, url):
        scenes, images = pictures(10)
        prompts, metadata = [s.prompt() for s in scenes], [s.metadata() for s in scenes]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TOKEN_HERE", "t0ken")
            found = score(url, images, prompts, metadata, token_env="TOKEN_HERE", batch=4)
        expected = make_reward("shapes_graded").score(images, prompts, metadata)
        assert torch.equal(found, expected)
        assert expected.std() > 0
        process.terminate()
        assert process.wait(20) == 0
        assert process.stdout.read() == "Stopped.\n"
        assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
@pytest.mark.processes
def test_ctrl_c_ends_the_command_also_where_its_parent_ignores_it(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it for what runs in the background
    try:
        with command(tmp_path) as (process, _):
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
            assert process.stdout.read() == "Stopped.\n"
    finally:
        signal.signal(signal.SIGINT, before)


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


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        *(("localhost", True), ("LOCALHOST:8000", True), ("127.0.0.1:1", True), ("127.9.9.9", True)),
        ("[::1]:80", True),
        *(("evil.example:8000", False), ("127.0.0.1.evil.example", False), ("localhost.evil.example", False)),
        *(("192.168.0.1", False), ("0.0.0.0", False), ("", False), ("[", False), ("a@localhost@b", False)),
        *((None, False), ("127.0.0.1\r\nHost: evil.example", False)),
    ],
)
def test_without_a_token_only_this_machines_own_names_are_answered(host: str | None, answered: bool) -> None:
    line = "" if host is None else f"Host: {host}\r\n"
    with reward_server(make_reward("brightness")) as url:
        for request in ("GET /health HTTP/1.1", "POST /score HTTP/1.1"):
            assert (status_of(url, f"{request}\r\n{line}Content-Length: 0\r\n\r\n") == 421) is not answered
    with reward_server(make_reward("brightness"), token="t0ken") as url:
        assert status_of(url, f"GET /health HTTP/1.1\r\n{line}\r\n") == 200


def status_of(url: str, request: str) -> int:
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(request.encode())
        return int(connection.makefile("rb").readline().split()[1])


def test_a_client_that_hangs_up_leaves_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    body = wire.pack(torch.rand(1, 3, 4, 4), ["a"], [{}])
    about = f"Host: localhost\r\nContent-Type: {wire.KIND}\r\nContent-Length: {len(body)}"
    head = f"POST /score HTTP/1.1\r\n{about}\r\n\r\n"
    with reward_server(Odd()) as url:
        for sent in (head.encode() + body, head.encode() + body[:10], head.encode()[:20], b"", b"\xff" * 99):
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # hangs up at once
                connection.sendall(sent)
        assert score(url, torch.rand(1, 3, 4, 4), ["a"]).tolist() == [1.0]
        time.sleep(0.2)  # for those who were hung up on to notice
    assert "Traceback" not in capfd.readouterr().err


def test_a_hundred_clients_may_knock_at_once() -> None:
    with RewardServer("odd", Odd(), "127.0.0.1", 0) as server, ExitStack() as stack:  # nobody accepts them yet
        for _ in range(100):
            stack.enter_context(socket.create_connection(server.server_address, timeout=2))


def test_what_a_client_or_a_reward_says_does_not_steer_the_servers_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with reward_server(Odd()) as url:
        status_of(url, "GET /\x1b[2J HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with pytest.raises(UserError) as error:
            score(url, torch.rand(1, 3, 4, 4), ["crash"], [{"note": "\x1b[2J"}])
    told = capfd.readouterr().err
    assert "RuntimeError: No such thing" in told
    assert "\x1b" not in told
    assert str(error.value).isprintable()


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
        ("crash", r"in 2 tries: .* answered 500 \(The reward 'odd' failed with RuntimeError: No such thing\)\."),
        ("leave", r"in 2 tries: .* answered 500 \(The reward 'odd' failed with SystemExit: Enough\)\."),
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
    image = torch.zeros(1, 3, 4, 4).byte()
    bodies = [
        (b"hello", "not a safetensors file"),
        (good[:-1], "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (wire.save({"images": torch.rand(2, 3, 4, 4)}), "uint8"),
        (wire.save({"other": torch.zeros(1)}), "uint8"),
        (wire.save({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}), '"prompts", a JSON list of texts'),
        (wire.save({"images": torch.zeros(1, 3, 4, 4).byte()}, {"prompts": '["a"]', "metadata": "[1]"}), "of objects"),
        (wire.save({"images": image}, {"prompts": "[" * 99999, "metadata": "[]"}), "of texts"),
        (wire.save({"images": image}, {"prompts": '["\\ud800"]', "metadata": "[{}]"}), "of texts"),
        (wire.pack(torch.rand(2, 3, 4, 4), ["a"], [{}, {}]), "2 images, 1 prompts and 2 metadata"),
        (wire.pack(torch.rand(1, 3, 4, 4), ["a"], [{}], [[torch.rand(1, 4, 4)]]), "uint8 [3, h, w]"),
        (b"", "no body"),
    ]
    with reward_server(make_reward("brightness")) as url:
        for body, problem in bodies:
            status, said = post(url, body)
            assert status == 400
            assert problem in said
        assert post(url, good, kind="text/plain") == (400, "The content type must be application/octet-stream.")
        assert post(url, good, path="/other")[0] == 404


def test_the_sources_of_edits_travel_with_the_images() -> None:
    images = (torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    sources = [[images[1]], [images[1]], [images[0]]]
    here = make_reward("similarity").score_edits(images, ["a", "a", "b"], [{}] * 3, sources)
    with reward_server(make_reward("similarity")) as url:
        remote = make_reward("remote", {"url": url, "backoff": 0.01, "retries": 1})
        torch.testing.assert_close(remote.score_edits(images, ["a", "a", "b"], [{}] * 3, sources), here)
        with pytest.raises(UserError, match="compares with a source picture, and an image came without one"):
            remote.score(images, ["a", "a", "b"], [{}] * 3)


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
