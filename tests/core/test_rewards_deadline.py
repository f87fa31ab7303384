"""One deadline over a whole request, whatever a server does to keep the line busy; and no key for another server."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
from bad_server import Talk, again_and_again, silent, talking
from judge_server import judges, says

from dgpo_core.common.errors import UserError
from dgpo_core.rewards import make_reward
from dgpo_core.rewards.network import request

pytestmark = pytest.mark.slow

KEY = "sk-test-1234"
TIMEOUT = 0.3

BUSY: dict[str, Talk] = {
    "says nothing": silent,
    "drips its status line": again_and_again(b"", b"H"),
    "drips one header": again_and_again(b"HTTP/1.1 200 OK\r\nX-Long: ", b"a"),
    "drips headers": again_and_again(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "says Continue for ever": again_and_again(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0),
    "drips the body": again_and_again(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b" "),
    "drips chunks": again_and_again(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "drips an error": again_and_again(b"HTTP/1.1 500 No\r\n\r\n", b"x"),
}


def complaint(url: str, side: int = 4, **options: object) -> str:
    reward = make_reward("remote", {"url": url, "timeout": TIMEOUT, "retries": 0, **options})
    with pytest.raises(UserError) as error:
        reward.score(torch.rand(1, 3, side, side), ["a"], [{}])
    return str(error.value)


def waiting() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dgpo-request"]


def nobody_waits() -> bool:
    """Whether all requests have let go of their lines, now or soon."""
    end = time.monotonic() + 5
    while waiting() and time.monotonic() < end:
        time.sleep(0.01)
    return not waiting()


@pytest.mark.parametrize("talk", BUSY.values(), ids=BUSY)
def test_one_deadline_is_over_all_of_a_request(talk: Talk) -> None:
    with talking(talk) as url:
        start = time.monotonic()
        told = complaint(url)
        assert time.monotonic() - start < TIMEOUT + 2  # a busy machine's two seconds; none of these servers ever ends
        assert told.endswith(f"the server {url} did not answer within {TIMEOUT:g} s.")
        assert nobody_waits()


def test_a_server_that_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with talking(silent) as url:
        assert "did not answer within" in complaint(url, side=2048)  # 12 MB: more than the system keeps for it
        assert nobody_waits()


def test_a_handshake_that_never_ends_is_left() -> None:
    with talking(silent) as url:
        assert "did not answer within" in complaint(url.replace("http:", "https:"))
        assert nobody_waits()


def test_a_name_service_that_never_answers_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "create_connection", lambda *_, **__: over.wait())
        assert "did not answer within" in complaint("http://judge.invalid")
    over.set()


def test_a_proxy_that_drips_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with talking(again_and_again(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n")) as proxy:
        monkeypatch.setenv("https_proxy", proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        assert "did not answer within" in complaint("https://judge.invalid")
        assert nobody_waits()


def test_connections_of_a_request_are_closed_after_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[request._Line] = []
    real = request._Line.cut
    monkeypatch.setattr(request._Line, "cut", lambda line: (lines.append(line), real(line))[1])
    with judges() as judge:
        assert judge(says("5")).score() == [0.5]
    (line,) = lines
    assert [connected.fileno() for connected in line._sockets] == [-1]


# --- the key ---------------------------------------------------------------------------------------------------------


@contextmanager
def listening(answer: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers so, and what it has heard."""
    heard: list[bytes] = []

    def talk(connection: socket.socket, over: threading.Event) -> None:
        connection.settimeout(0.2)
        said = b""
        with suppress(TimeoutError):
            while part := connection.recv(2**16):
                said += part
        heard.append(said)
        connection.sendall(answer)

    with talking(talk) as url:
        yield url, heard


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_so_the_key_stays(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", KEY)
    with listening(b"HTTP/1.1 200 OK\r\n\r\n") as (elsewhere, heard):
        moved = f"HTTP/1.1 {status} Moved\r\nLocation: {elsewhere}/score\r\nContent-Length: 0\r\n\r\n".encode()
        with listening(moved) as (url, asked):
            told = complaint(url, token_env="TOKEN", timeout=5)
            assert f"answered {status}" in told
            assert f"Bearer {KEY}".encode() in asked[0]
    assert heard == []


def test_a_key_that_is_not_encrypted_goes_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", KEY)
    monkeypatch.delenv("no_proxy", raising=False)
    with listening(b"HTTP/1.1 500 No\r\n\r\n") as (proxy, heard):
        monkeypatch.setenv("http_proxy", proxy)
        assert "cannot be reached" in complaint("http://judge.invalid", token_env="TOKEN", timeout=5)
        assert heard == []
        assert "answered 500" in complaint("http://judge.invalid", timeout=5)
        assert len(heard) == 1
        assert b"Authorization" not in heard[0]


# --- what a server says ----------------------------------------------------------------------------------------------

ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202egnorw \x9b31m"


def test_what_a_server_says_does_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with judges() as judge:
        for answer in (
            *((400, {"error": {"message": f"{ESCAPES} {KEY}"}}), (400, {"error": ESCAPES}), (400, ESCAPES.encode())),
            *(says(f"{ESCAPES} {KEY}"), says(f"{ESCAPES} nan {KEY}")),
        ):
            told = judge(answer).complaint(key_env="JUDGE_KEY", pattern="nan|[0-9]{9}", retries=0)
            assert told.isprintable()
            assert KEY not in told
            assert "owned" in told


@pytest.mark.slow
def test_a_pattern_that_takes_for_ever_is_left() -> None:
    with judges() as judge:
        start = time.monotonic()
        told = judge(says("a" * 5000 + "!")).complaint(pattern="(a+)+$", retries=0)
        assert "takes more than 1 s to search" in told
        assert time.monotonic() - start < 10


def test_an_answer_that_is_nested_without_end_is_refused() -> None:
    with judges() as judge:
        for answer in (b"[" * 100_000, b'{"choices": ' + b"[" * 100_000, b'{"choices": [' + b"9" * 5000 + b"]}"):
            assert "did not answer with a chat completion" in judge((200, answer)).complaint(retries=0)
            assert "answered 400" in judge((400, answer)).complaint(retries=0)
    scores = b'{"scores": [' + b"9" * 19 + b"]}"
    with judges() as judge:
        reward = make_reward("remote", {"url": judge((200, scores)).url})
        assert reward.score(torch.rand(1, 3, 4, 4), ["a"], [{}]).tolist() == pytest.approx([1e19])
