"""Asking a server over HTTP: with a key, a time limit, and patience for what passes by itself."""

import http.client
import os
import random
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

from dgpo_core.common import patience
from dgpo_core.common.errors import UserError
from dgpo_core.common.files import reason
from dgpo_core.common.reading import parse_json, shown
from dgpo_core.rewards.base import Reward
from dgpo_core.rewards.network import endpoints
from dgpo_core.rewards.network.endpoints import Endpoint
from dgpo_core.rewards.network.request import MOST_BYTES, Answer, post

LOOPBACK = ("localhost", "127.0.0.1", "::1")
LONGEST_WAIT = 60.0  # seconds between two tries
DAY = 24 * 3600.0  # seconds

Read = TypeVar("Read")
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

    reward: its name, for messages. place: where it is; its key or token is sent as "Authorization: Bearer". timeout:
    seconds for one request, from connecting to the end of the answer. retries: further tries after a status of 408, 429
    or 5xx, a lost connection, a timeout or an unusable answer. backoff: seconds before the first of them, doubled each
    time and jittered; a longer Retry-After counts.
    The key goes to this address only: redirects are not followed, and where there is no TLS no proxy is asked. Raises
    UserError for unusable values.
    """

    def __init__(
        self, reward: str, place: Endpoint, timeout: float = 60.0, retries: int = 4, backoff: float = 1.0
    ) -> None:
        self.reward = reward
        self.url, secure, host = self._address(place.url)
        self.timeout = number(reward, "timeout", timeout, above=0, most=DAY)
        self.retries = whole(reward, "retries", retries, most=1000)
        self.backoff = number(reward, "backoff", backoff, most=DAY)
        try:
            self.key = secret(place.key_env)
        except UserError as error:
            self.fail(str(error))
        self.direct = host in LOOPBACK or (bool(self.key) and not secure)

    def fail(self, problem: str) -> NoReturn:
        """Raises UserError with the reward's name before the problem."""
        raise UserError(f"The reward {self.reward!r}: {problem}")

    def ask(
        self,
        path: str,
        body: bytes,
        kind: str,
        read: Callable[[bytes], Read],
        sample: str,
        before: Callable[[], None] = lambda: None,
    ) -> Read:
        """What `read` makes of the answer to a POST of `body`, of the content type `kind`.

        read: may raise Refused. sample: what the request was for, as in "sample 3 ('a cat')". before: called before
        each try. Raises UserError with the server, the sample and the reason; ends early as `patience` has it.
        """
        for attempt in range(self.retries + 1):
            before()
            try:
                return read(self._post(path, body, kind))
            except Refused as refused:
                if attempt == self.retries or not refused.again:
                    tries = f" in {attempt + 1} tries" if attempt else ""
                    self.fail(f"no score for {sample}{tries}: the server {self.url} {refused}.")
                patience.pause(max(self._pause(attempt), refused.wait))
        raise AssertionError("unreachable")

    def quoted(self, text: str, most: int) -> str:
        """What a server said, for a sentence: in one line of at most so many characters, without the key."""
        text = " ".join(text.split())
        return shown(text.replace(self.key, "***") if self.key else text, most)

    def _pause(self, attempt: int) -> float:
        return min(LONGEST_WAIT, self.backoff * 2 ** min(attempt, 32)) * _jitter.uniform(0.75, 1.25)

    def _post(self, path: str, body: bytes, kind: str) -> bytes:
        headers = {"Content-Type": kind, "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url + path, body, headers, method="POST")
        try:
            answer = post(request, self.timeout, self.direct)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Refused(self._problem(error)) from None
        if len(answer.content) > MOST_BYTES:
            raise Refused(f"sent more than {MOST_BYTES // 2**20} MB", again=False)
        if answer.status == 200:
            return answer.content
        again = answer.status in (408, 429) or answer.status >= 500
        said = self.quoted(_message(answer.content), 400).removesuffix(".")
        raise Refused(f"answered {answer.status}{f' ({said})' if said else ''}", again, _retry_after(answer))

    def _problem(self, error: Exception) -> str:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            return f"did not answer within {self.timeout:g} s"
        said = reason(cause) if isinstance(cause, Exception) else str(cause)
        return f"cannot be reached ({self.quoted(said, 200) or type(cause).__name__})"

    def _address(self, url: str) -> tuple[str, bool, str]:
        """The address without a last slash, whether it is encrypted, and its host."""
        try:
            parts = urllib.parse.urlsplit(url if isinstance(url, str) else "")
            host = parts.hostname or ""
            good = parts.scheme in ("http", "https") and bool(host) and (parts.port is None or parts.port > 0)
        except ValueError:
            good = False
        if not good or "@" in parts.netloc or parts.query or parts.fragment or not url.isprintable() or " " in url:
            # not shown: there may be a password in it
            self.fail("its option url must be the server's address, such as http://127.0.0.1:8000, without a password.")
        return url.rstrip("/"), parts.scheme == "https", host


class ServerReward(Reward):
    """A reward that a server computes. key_option: the option that names the variable with its key or token."""

    name: ClassVar[str]
    key_option: ClassVar[str] = "key_env"
    shareable: ClassVar[tuple[str, ...]] = ("endpoint", "timeout", "retries", "backoff")

    @classmethod
    def place(cls, options: Mapping[str, Any]) -> Endpoint:
        """The server that the options name. Raises UserError where they name none, an unknown one, or two."""
        name, given = options.get("endpoint", ""), {key: options.get(key, "") for key in ("url", cls.key_option)}
        if not name and given["url"]:
            return Endpoint(given["url"], key_env=given[cls.key_option])
        if not isinstance(name, str) or any(given.values()):
            problem = f"give either endpoint, which is a name, or url with {cls.key_option}, not both."
            raise UserError(f"The reward {cls.name!r}: {problem}")
        if not name:
            raise UserError(
                f'The reward {cls.name!r} needs a server: name it in its options, {{"endpoint": "my_server"}}, and'
                f" {endpoints.advice()}"
            )
        try:
            return endpoints.find(name)
        except UserError as error:
            raise UserError(f"The reward {cls.name!r}: {error}") from None

    @classmethod
    def require(cls, options: Mapping[str, Any]) -> None:
        Server(cls.name, cls.place(options))

    @classmethod
    def asks(cls, options: Mapping[str, Any]) -> str:
        place = cls.place(options)
        if not place.key_env:
            return shown(place.url)
        # who mistook the option for the key itself is not to read it on the terminal
        variable = f"the variable {place.key_env}" if place.key_env in os.environ else "a variable that is not set"
        return f"{shown(place.url)} with the key in {variable}"


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


def whole(reward: str, name: str, value: Any, least: int = 0, most: int = 2**31) -> int:
    """The option `value`, a whole number from `least` to `most`. Raises UserError."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        upper = f" and at most {most}" if isinstance(value, int) and value > most else ""
        needed = f"{name} must be a whole number of at least {least}{upper}"
        raise UserError(f"The reward {reward!r}: {needed}, not {shown(repr(value))}.")
    return value


def number(reward: str, name: str, value: Any, above: float | None = None, most: float = float("inf")) -> float:
    """The option `value`, a number above `above`, or of at least 0, and of at most `most`. Raises UserError."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not (value >= 0 if above is None else value > above) or value == float("inf") or value > most:
        least = "at least 0" if above is None else f"above {above:g}"
        upper = f" and at most {most:g}" if good and value > most else ""
        raise UserError(f"The reward {reward!r}: {name} must be a number {least}{upper}, not {shown(repr(value))}.")
    return float(value)


def _message(content: bytes) -> str:
    """What a server says of an error: {"error": ...}, as a text or as OpenAI has it, or what is there."""
    try:
        problem = parse_json(content, "The answer")["error"]
        return str(problem["message"] if isinstance(problem, dict) else problem)
    except (UserError, KeyError, TypeError, IndexError):
        return content[:4000].decode("utf-8", "replace")


def _retry_after(answer: Answer) -> float:
    seconds = answer.headers.get("Retry-After", "")
    return min(LONGEST_WAIT, float(seconds)) if seconds.isdecimal() and len(seconds) < 10 else 0.0
