"""`python -m dgpo_core.rewards.serve --reward NAME`: one reward as an HTTP server, for the reward `remote`.

GET /health says which reward it is. POST /score takes images, prompts and metadata (see `wire`) and answers
{"scores": [...]}; what is wrong is answered as {"error": "one sentence"}. Ctrl-C and SIGTERM end it with exit code 0.
"""

import hmac
import ipaddress
import signal
import socket
import sys
import threading
import traceback
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from dgpo_core.common.distributed import World
from dgpo_core.common.errors import UserError
from dgpo_core.common.files import reason
from dgpo_core.common.local_server import JsonHandler, LocalServer
from dgpo_core.common.reading import parse_json, shown
from dgpo_core.common.terminal import note
from dgpo_core.rewards.base import Reward
from dgpo_core.rewards.guard import described
from dgpo_core.rewards.network import wire
from dgpo_core.rewards.network.web import secret
from dgpo_core.rewards.registry import make_reward
from dgpo_core.rewards.scoring import checked
from dgpo_core.settings.command_line import command, parse

WRONG_HOST = "Ask this machine by the name localhost or 127.0.0.1, or start the server with a token (--token_env)."


@dataclass(frozen=True)
class ServeConfig:
    """Serve one reward over HTTP."""

    reward: str
    """The reward to score with."""
    options: str = ""
    """Its options, as JSON."""
    host: str = "127.0.0.1"
    """The address to listen on; one that is not of this machine alone needs a token."""
    port: int = 8000
    """The port to listen on; 0 takes a free one."""
    token_env: str = ""
    """Name of the environment variable that holds the token which clients must send."""
    limit_mb: int = 256
    """The largest request, in MB (2^20 bytes): 16 images of 1024 x 1024 pixels are 48."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1 or mps."""


class RewardServer(LocalServer):
    """Answers for one reward; one request is scored at a time, the others wait.

    token: what clients must send; empty for none, which is refused on an address that other machines reach. Without one
    only requests are answered that ask for this machine by its own name: a page in a browser here, whose own name is
    made to lead here (DNS rebinding), asks for that name.
    limit: bytes of a request. Raises UserError where it cannot listen.
    """

    def __init__(self, name: str, reward: Reward, host: str, port: int, token: str = "", limit: int = 2**28) -> None:
        self.name, self.reward, self.token, self.limit = name, reward, token, limit
        self.lock = threading.Lock()
        try:
            self.address_family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            numeric = str(address[0])
            local = ipaddress.ip_address(numeric.partition("%")[0]).is_loopback
            if local or token:
                super().__init__((numeric, int(address[1])), Handler)
        except (OSError, UnicodeError) as error:
            raise UserError(f"Cannot listen on {host}, port {port}: {reason(error)}.") from None
        if not local and not token:
            raise UserError(f"Other machines can reach {host}: name a token's environment variable with --token_env.")

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = cast(tuple[str, int], self.server_address[:2])  # not one of Unix's, which may be bytes
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def scores(self, request: wire.Request) -> list[float]:
        """The reward's scores, turned where lower ones are better, which nobody could know who asks by `remote`.

        Raises UserError for what it cannot score.
        """
        if self.reward.needs_source and not all(request.sources):
            raise UserError(f"The reward {self.name!r} compares with a source picture, and an image came without one.")
        with self.lock:
            values = self.reward.score_edits(*request)
        scores = checked(self.name, values, request.prompts)
        return (scores if self.reward.higher_is_better else -scores).tolist()


class Handler(JsonHandler):
    """One request."""

    server: RewardServer
    server_version = "dgpo-reward"

    def do_GET(self) -> None:
        """/health."""
        if not self._means_us():
            self.answer(HTTPStatus.MISDIRECTED_REQUEST, {"error": WRONG_HOST})
        elif self.path == "/health":
            self.answer(HTTPStatus.OK, {"reward": self.server.name})
        else:
            self.answer(HTTPStatus.NOT_FOUND, {"error": "There are GET /health and POST /score."})

    def do_POST(self) -> None:
        """/score."""
        size = self.size()
        status, problem = self._refusal(size)
        if problem:
            self.drop(size)
            self.answer(status, {"error": problem})
        else:
            self.answer(*self._score(self.rfile.read(size)))

    def _refusal(self, size: int) -> tuple[HTTPStatus, str]:
        """What is wrong with a request before its body is read."""
        sent = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if not self._means_us():
            return HTTPStatus.MISDIRECTED_REQUEST, WRONG_HOST
        if self.path != wire.PATH:
            return HTTPStatus.NOT_FOUND, "There are GET /health and POST /score."
        if self.server.token and not hmac.compare_digest(sent, f"Bearer {self.server.token}".encode()):
            return HTTPStatus.UNAUTHORIZED, "The token is missing or wrong."
        if self.headers.get_content_type() != wire.KIND:
            return HTTPStatus.BAD_REQUEST, f"The content type must be {wire.KIND}."
        if not size:
            return HTTPStatus.BAD_REQUEST, "The request has no body, or does not say its Content-Length."
        if size > self.server.limit:
            problem = f"The request is larger than {self.server.limit / 2**20:g} MB: send smaller batches, or raise"
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{problem} the server's --limit_mb."
        return HTTPStatus.OK, ""

    def _means_us(self) -> bool:
        """Whether who asks knows the token, if there is one, or asks this machine by its own name."""
        hosts = self.headers.get_all("Host", [])
        return bool(self.server.token) or (len(hosts) == 1 and is_loopback(hosts[0]))

    def _score(self, body: bytes) -> tuple[HTTPStatus, dict[str, Any]]:
        try:
            request = wire.unpack(body)
        except ValueError as error:
            return HTTPStatus.BAD_REQUEST, {"error": str(error)}
        try:
            return HTTPStatus.OK, {"scores": self.server.scores(request)}
        except UserError as error:
            return HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)}
        except (Exception, SystemExit) as error:
            note(traceback.format_exc())
            problem = f"The reward {self.server.name!r} failed with {described(error)}."
            return HTTPStatus.INTERNAL_SERVER_ERROR, {"error": problem}

    def log_message(self, format: str, *args: Any) -> None:
        """One line for a request."""
        note(f"{self.address_string()} [{self.log_date_time_string()}] {shown(format % args)}")


def is_loopback(host: str) -> bool:
    """Whether a Host header, with or without a port, names this machine as only it can be named."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def make_server(options: ServeConfig) -> RewardServer:
    """The server, listening already. Raises UserError for options that cannot work."""
    if not 0 <= options.port < 2**16:  # the system would take another one
        raise UserError(f"--port is {options.port} but must be 0 to 65535.")
    if options.limit_mb < 1:
        raise UserError(f"--limit_mb is {options.limit_mb} but must be at least 1.")
    try:
        token = secret(options.token_env)
    except UserError as error:
        raise UserError(f"--token_env: {error}") from None
    reward = make_reward(options.reward, _read_options(options.options), str(World(options.device).device))
    return RewardServer(options.reward, reward, options.host, options.port, token, options.limit_mb * 2**20)


def _read_options(text: str) -> dict[str, Any]:
    options = parse_json(text, "--options") if text else {}
    if not isinstance(options, dict):
        raise UserError("--options must be an object, such as '{\"quality\": 90}'.")
    return options


@contextmanager
def ending() -> Iterator[None]:
    """SIGTERM, as from a service manager, and SIGINT raise KeyboardInterrupt; the latter also in the background, where
    shells leave it ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 after Ctrl-C or SIGTERM, 2 after a user's mistake."""
    return command(lambda: parse(ServeConfig, argv, "python -m dgpo_core.rewards.serve", __doc__), _serve)


def _serve(options: ServeConfig) -> None:
    try:
        with ending(), make_server(options) as server, closing(server.reward):
            print(f"The reward {server.name!r} is at {server.url}; Ctrl-C stops it.", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print("Stopped.")


if __name__ == "__main__":
    sys.exit(main())
