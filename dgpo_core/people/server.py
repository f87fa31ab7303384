"""The page that asks a person: one port of this machine, one token, the ranking dialog.

GET / is the page. It asks GET questions for what is open, shows images/NAME, and gives an answer to POST
questions/TOKEN; POST questions/TOKEN/next tells which pair comes next. Whatever tells of the run needs ?token=..., the
server's own; the page's scripts and styles do not. All addresses in the page are relative, so that it works through a
forwarded port or behind a proxy.
"""

import hmac
import secrets
import threading
import urllib.parse
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from typing import Any

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import reason
from dgpo_core.common.local_server import JsonHandler, LocalServer
from dgpo_core.common.reading import parse_json
from dgpo_core.people.questions import Questions, UnknownQuestion

HOST = "127.0.0.1"
MOST_BYTES = 2**20  # of an answer
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".png": "image/png"}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # the token is in the page's address
    "X-Content-Type-Options": "nosniff",
}


class AskingServer(LocalServer):
    """Serves the page in a thread of its own until `close`.

    folder: of the images that questions name. Raises UserError where the port is taken.
    """

    def __init__(self, questions: Questions, folder: Path, port: int) -> None:
        self.questions, self.folder, self.token = questions, folder, secrets.token_urlsafe(16)
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise UserError(f"Cannot listen on port {port} of {HOST}: {reason(error)}; choose --human.port.") from None
        threading.Thread(target=self.serve_forever, name="dgpo-asking", daemon=True).start()

    @property
    def url(self) -> str:
        """What to open."""
        return f"http://{HOST}:{self.server_address[1]}/?token={self.token}"

    def close(self) -> None:
        """Stop listening."""
        self.shutdown()
        self.server_close()

    def image(self, name: str) -> bytes | None:
        """The file of an image, if a question that is open shows it."""
        groups = [group for question in self.questions.pending() for group in question["groups"]]
        shown = {image["filename"] for group in groups for image in (*group["images"], *group["sources"])}
        return (self.folder / name).read_bytes() if name in shown else None


class Handler(JsonHandler):
    """One request."""

    server: AskingServer
    server_version = "dgpo"

    def do_GET(self) -> None:
        """The page and its parts, the open questions, their images."""
        path = urllib.parse.urlsplit(self.path).path
        asset = _asset("index.html" if path == "/" else path.removeprefix("/"))
        if asset and path not in ("/", "/index.html"):
            self.send(HTTPStatus.OK, *asset)
        elif not self._knows_token():
            self.answer(
                HTTPStatus.FORBIDDEN, {"error": "The token is missing or wrong: open the address printed last."}
            )
        elif asset and path == "/":
            self.send(HTTPStatus.OK, *asset)
        elif path == "/questions":
            self.answer(HTTPStatus.OK, {"questions": self.server.questions.pending()})
        else:
            self._image(urllib.parse.unquote(path))

    def do_POST(self) -> None:
        """An answer."""
        path, size = urllib.parse.urlsplit(self.path).path, self.size()
        if not self._knows_token() or not path.startswith("/questions/") or size > MOST_BYTES:
            self.drop(size)
            self.answer(HTTPStatus.FORBIDDEN, {"error": "The token is missing or wrong, or this is no answer."})
        else:
            self.answer(*self._take(path.removeprefix("/questions/"), self.rfile.read(size)))

    def _take(self, question: str, body: bytes) -> tuple[HTTPStatus, dict[str, Any]]:
        questions, (token, *more) = self.server.questions, question.split("/", 1)
        try:
            said = parse_json(body, "The answer")
            if more == ["next"]:
                return HTTPStatus.OK, questions.next(token, said)
            questions.answer(question, said)
        except UnknownQuestion as error:
            return HTTPStatus.NOT_FOUND, {"error": str(error)}
        except UserError as error:
            return HTTPStatus.BAD_REQUEST, {"error": str(error)}
        return HTTPStatus.OK, {}

    def _image(self, path: str) -> None:
        content = self.server.image(path.removeprefix("/images/"))
        if content is None:
            self.answer(HTTPStatus.NOT_FOUND, {"error": "There is no such page."})
        else:
            self.send(HTTPStatus.OK, content, KINDS[".png"])

    def _knows_token(self) -> bool:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        return hmac.compare_digest(query.get("token", [""])[0].encode(), self.server.token.encode())

    def end_headers(self) -> None:
        """With what a browser must know of every answer."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the console is the training's."""


def _asset(name: str) -> tuple[bytes, str] | None:
    """A part of the page, and its content type."""
    part = next((file for file in files("dgpo_core.people").joinpath("web").iterdir() if file.name == name), None)
    return (part.read_bytes(), f"{KINDS[Path(name).suffix]}; charset=utf-8") if part else None
