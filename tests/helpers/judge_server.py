"""A server of chat completions on loopback that misbehaves as it is told."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_core.common.errors import UserError
from dgpo_core.rewards import make_reward


@dataclass
class Script:
    """What the server answers, one after the other, the last one again and again; and what it was asked."""

    answers: list[tuple[int, Any]]
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0  # seconds before an answer
    drip: float = 0.0  # seconds before each of its bytes
    asked: list[dict[str, Any]] = field(default_factory=list)
    sent: list[dict[str, str]] = field(default_factory=list)
    most: int = 0  # requests at once
    url: str = ""

    def score(self, images: Tensor | None = None, prompts: Sequence[str] = ("a cat",), **options: Any) -> list[float]:
        """The scores of a judge that asks this server."""
        options = {"url": self.url, "model": "m", "backoff": 0.01, "retries": 2, **options}
        images = torch.rand(len(prompts), 3, 8, 8) if images is None else images
        return make_reward("vlm_judge", options).score(images, prompts, [{}] * len(prompts)).tolist()

    def complaint(self, **options: Any) -> str:
        with pytest.raises(UserError) as error:
            self.score(**options)
        return str(error.value)


def says(text: Any, **more: Any) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, **more}]}


@contextmanager
def serving(server: http.server.HTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(script: Script) -> type[http.server.BaseHTTPRequestHandler]:
    lock, now = threading.Lock(), [0]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked = json.loads(body) if self.headers["Content-Type"] == "application/json" else {}
            with lock:
                now[0] += 1
                script.most = max(script.most, now[0])
                script.asked.append({"path": self.path, **asked})
                script.sent.append(dict(self.headers))
                status, answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            time.sleep(script.delay)
            with lock:
                now[0] -= 1
            with suppress(OSError):  # a client that did not wait
                self._answer(status, answer)

        def _answer(self, status: int, answer: Any) -> None:
            if status == 0:  # hangs up
                self.connection.close()
                return
            self.send_response(status)
            for name, value in script.headers.items():
                self.send_header(name, value)
            self.end_headers()
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            for part in [body[i : i + 1] for i in range(len(body))] if script.drip else [body]:
                time.sleep(script.drip)
                self.wfile.write(part)

        def log_message(self, *_: Any) -> None: ...

    return Handler


@contextmanager
def judges() -> Iterator[Callable[..., Script]]:
    """A function that starts a server with these answers; all of them end with the context."""
    with ExitStack() as stack:

        def start(*answers: tuple[int, Any], **more: Any) -> Script:
            script = Script(list(answers), **more)
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(script))
            script.url = stack.enter_context(serving(server)) + "/v1"
            return script

        yield start
