"""One HTTP request with one deadline over all of it: name service, connection, TLS, sending, headers, body."""

import contextlib
import functools
import http.client
import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable
from concurrent import futures
from email.message import Message
from typing import Any, NamedTuple, TypeVar

from dgpo_core.common import patience

MOST_BYTES = 16 * 2**20  # of an answer

Result = TypeVar("Result")


class Answer(NamedTuple):
    """What a server said. content: at most `MOST_BYTES`, and one more where there was more."""

    status: int
    headers: Message
    content: bytes


def post(request: urllib.request.Request, seconds: float, direct: bool = False) -> Answer:
    """The answer, whatever its status: a redirect is an answer as well and is not followed.

    seconds: until the answer is complete; then the connection is cut, however busy the server keeps it. direct: leave
    out the proxy that the environment names. Raises OSError (TimeoutError past the deadline), http.client.HTTPException
    or ValueError where there is no answer.
    """
    line = _Line()
    try:
        return _within(seconds, functools.partial(_post, request, seconds, direct, line))
    finally:
        line.cut()


def _within(seconds: float, work: Callable[[], Result]) -> Result:
    """What `work` returns or raises. Raises TimeoutError after so many seconds, and leaves it to its thread, as where
    nobody waits any more (`patience`)."""
    done: futures.Future[Result] = futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="dgpo-request", daemon=True).start()
    return patience.result(done, seconds)


def _post(request: urllib.request.Request, seconds: float, direct: bool, line: "_Line") -> Answer:
    proxies = [urllib.request.ProxyHandler({})] if direct else []
    opener = urllib.request.build_opener(_AsItIs, _Http(line), _Https(line), *proxies)
    with opener.open(request, timeout=seconds) as answer:
        return Answer(answer.status, answer.headers, answer.read(MOST_BYTES + 1))


class _Line:
    """The connections of one request, to be cut from another thread."""

    def __init__(self) -> None:
        self._lock, self._is_cut = threading.Lock(), False
        self._sockets: list[socket.socket] = []

    def connect(self, *args: Any, **kwargs: Any) -> socket.socket:
        """`socket.create_connection`. Raises TimeoutError where the line has been cut meanwhile."""
        connected = socket.create_connection(*args, **kwargs)
        with self._lock:
            if self._is_cut:
                connected.close()
                raise TimeoutError
            self._sockets.append(connected.dup())  # the same connection; TLS will take the socket itself away
        return connected

    def cut(self) -> None:
        """Whoever waits for the other side waits no longer."""
        with self._lock:
            self._is_cut = True
            for connected in self._sockets:
                with contextlib.suppress(OSError):  # the other side was faster
                    connected.shutdown(socket.SHUT_RDWR)
                connected.close()


class _AsItIs(urllib.request.HTTPErrorProcessor):
    """Every answer is an answer: no redirects, no exceptions for a status."""

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        return response

    https_response = http_response


class _Http(urllib.request.HTTPHandler):
    """http:// over a line."""

    def __init__(self, line: _Line) -> None:
        super().__init__()
        self.line = line

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_over, self.line, http.client.HTTPConnection), request)


class _Https(urllib.request.HTTPSHandler):
    """https:// over a line."""

    def __init__(self, line: _Line) -> None:
        super().__init__()
        self.line = line

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        connection = functools.partial(_over, self.line, http.client.HTTPSConnection)
        return self.do_open(connection, request, context=_tls())


def _over(line: _Line, kind: type[http.client.HTTPConnection], *args: Any, **kwargs: Any) -> Any:
    connection: Any = kind(*args, **kwargs)
    connection._create_connection = line.connect  # http.client's own place for it; there is no public one
    return connection


@functools.cache
def _tls() -> ssl.SSLContext:
    """The system's authorities, read once."""
    return ssl.create_default_context()
