"""Asking a server over HTTP: with a key, a time limit, and patience for what passes by itself."""

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from dgpo_core.errors import UserError
from dgpo_core.files import reason

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MOST_BYTES = 16 * 2**20  # of an answer
LONGEST_WAIT = 60.0  # seconds between two tries

Answer = TypeVar("Answer")
_jitter = random.Random()


class Refused(Exception):
    """A try without a usable answer.

    Its text ends a sentence that starts with the server. again: whether another try may help; wait: seconds that the
    server asks for.
    """

    def __init__(self, text: str, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(text)
        self.again, self.wait = again, wait


class Server:
    """One server, as a reward asks it.

    reward: its name, for messages. key_env: name of the environment variable with the key or token that is sent as
    "Authorization: Bearer"; empty for none. timeout: seconds until an answer begins, and again until it is complete.
    retries: further tries after a status of 408, 429 or 5xx, a lost connection, a timeout or an unusable answer.
    backoff: seconds before the first of them, doubled each time and jittered; a longer Retry-After counts.
    Redirects are not followed: they would carry the key elsewhere. Raises UserError for unusable values.
    """

    def __init__(
        self, reward: str, url: str, key_env: str = "", timeout: float = 60.0, retries: int = 4, backoff: float = 1.0
    ) -> None:
        self.reward = reward
        self.url, host = self._address(url)
        self.timeout = number(reward, "timeout", timeout, above=0)
        self.retries = whole(reward, "retries", retries)
        self.backoff = number(reward, "backoff", backoff)
        try:
            self.key = secret(key_env)
        except UserError as error:
            self.fail(str(error))
        direct = [urllib.request.ProxyHandler({})] if host in LOOPBACK else []
        self.opener = urllib.request.build_opener(_AsItIs, *direct)

    def fail(self, problem: str) -> NoReturn:
        """Raises UserError with the reward's name before the problem."""
        raise UserError(f"The reward {self.reward!r}: {problem}")

    def ask(
        self,
        path: str,
        body: bytes,
        kind: str,
        read: Callable[[bytes], Answer],
        sample: str,
        before: Callable[[], None] = lambda: None,
        stop: threading.Event | None = None,
    ) -> Answer:
        """What `read` makes of the answer to a POST of `body`, of the content type `kind`.

        read: may raise Refused. sample: what the request was for, as in "sample 3 ('a cat')". before: called before
        each try. stop: once it is set there are no more tries. Raises UserError with the server, the sample and the
        reason.
        """
        stop = stop or threading.Event()
        for attempt in range(self.retries + 1):
            before()
            try:
                return read(self._post(path, body, kind))
            except Refused as refused:
                last = attempt == self.retries or not refused.again
                if last or stop.wait(max(self._pause(attempt), refused.wait)):
                    tries = f" in {attempt + 1} tries" if attempt else ""
                    self.fail(f"no score for {sample}{tries}: the server {self.url} {refused}.")
        raise AssertionError("unreachable")

    def _pause(self, attempt: int) -> float:
        return min(LONGEST_WAIT, self.backoff * 2**attempt) * _jitter.uniform(0.75, 1.25)

    def _post(self, path: str, body: bytes, kind: str) -> bytes:
        headers = {"Content-Type": kind, "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url + path, body, headers, method="POST")
        try:
            with self.opener.open(request, timeout=self.timeout) as answer:
                content = _content(answer, time.monotonic() + self.timeout)
        except (OSError, http.client.HTTPException) as error:
            raise Refused(self._problem(error)) from None
        if answer.status == 200:
            return content
        again = answer.status in (408, 429) or answer.status >= 500
        said = _message(content)
        said = f" ({said.replace(self.key, '***') if self.key else said})" if said else ""
        raise Refused(f"answered {answer.status}{said}", again, _retry_after(answer))

    def _problem(self, error: Exception) -> str:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            return f"did not answer within {self.timeout:g} s"
        said = reason(cause) if isinstance(cause, Exception) else str(cause)
        return f"cannot be reached ({said or type(cause).__name__})"

    def _address(self, url: str) -> tuple[str, str]:
        """The address without a last slash, and its host."""
        try:
            parts = urllib.parse.urlsplit(url if isinstance(url, str) else "")
            good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            good = False
        if not good or "@" in parts.netloc or parts.query or parts.fragment or not url.isprintable() or " " in url:
            # not shown: there may be a password in it
            self.fail("its option url must be the server's address, such as http://127.0.0.1:8000, without a password.")
        return url.rstrip("/"), parts.hostname


class _AsItIs(urllib.request.HTTPErrorProcessor):
    """Every answer is an answer: no redirects, no exceptions for a status."""

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        return response

    https_response = http_response


def secret(key_env: str) -> str:
    """The key in the environment variable `key_env`; empty for no name.

    Raises UserError, which does not repeat `key_env` (it may be the key itself), where there is none.
    """
    if not key_env:
        return ""
    key = os.environ.get(key_env, "").strip() if isinstance(key_env, str) and "\0" not in key_env else ""
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(
            "the environment variable that is to hold its key is not set, or holds no key: give the variable's name,"
            " not the key."
        )
    return key


def whole(reward: str, name: str, value: Any, least: int = 0) -> int:
    """The option `value`, a whole number of at least `least`. Raises UserError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"The reward {reward!r}: {name} must be a whole number of at least {least}, not {value!r}.")
    return value


def number(reward: str, name: str, value: Any, above: float | None = None) -> float:
    """The option `value`, a number above `above`, or of at least 0. Raises UserError."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not (value >= 0 if above is None else value > above) or value == float("inf"):
        least = "at least 0" if above is None else f"above {above:g}"
        raise UserError(f"The reward {reward!r}: {name} must be a number {least}, not {value!r}.")
    return float(value)


def _content(answer: Any, end: float) -> bytes:
    parts, size = [], 0
    while part := answer.read1(2**16):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise Refused(f"sent more than {MOST_BYTES // 2**20} MB", again=False)
        if time.monotonic() > end:
            raise TimeoutError
    return b"".join(parts)


def _message(content: bytes) -> str:
    """What a server says of an error, in one line: {"error": ...}, as a text or as OpenAI has it, or as it is."""
    text = content[:4000].decode("utf-8", "replace")
    try:
        found = json.loads(content)["error"]
        text = found["message"] if isinstance(found, dict) else found
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(str(text).split())[:400].removesuffix(".")


def _retry_after(answer: Any) -> float:
    seconds = answer.headers.get("Retry-After", "")
    return min(LONGEST_WAIT, float(seconds)) if seconds.isdecimal() else 0.0
