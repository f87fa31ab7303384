"""What our two HTTP servers share: answers in JSON, and requests that are not read further than need be."""

import http.server
import json
import socketserver
import sys
from http import HTTPStatus
from typing import Any

MOST_DROPPED = 2**30  # bytes


class LocalServer(http.server.ThreadingHTTPServer):
    """One thread per request, none of which keeps the process alive."""

    daemon_threads = True
    request_queue_size = 128  # clients that may knock at once; a process with several workers sends as many

    def server_bind(self) -> None:
        """Not HTTPServer's, which asks the name service what the address is called."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class JsonHandler(http.server.BaseHTTPRequestHandler):
    """One request."""

    timeout = 60  # seconds without a byte

    def size(self) -> int:
        """Bytes of the request's body; 0 where it has none, or does not say."""
        length = self.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() and len(length) < 16 else 0

    def drop(self, size: int) -> None:
        """Reads what is not wanted, up to a limit: a client that is still sending would not see the answer."""
        size = min(size, MOST_DROPPED)
        while size > 0 and (part := self.rfile.read(min(size, 2**20))):
            size -= len(part)

    def answer(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        """Sends JSON."""
        self.send(status, json.dumps(content).encode(), "application/json")

    def send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        """Sends a body of a content type."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
