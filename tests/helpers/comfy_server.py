"""A real ComfyUI for the tests: finds one, runs it on the CPU in a folder of its own, and talks to it over HTTP."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

REPO = Path(__file__).resolve().parents[2]
START = 300  # seconds until a started server must answer; it takes 10 to 30 on an idle machine
FLAGS = os.environ.get("COMFYUI_FLAGS", "--cpu").split()
"""How every ComfyUI of the tests is started; "COMFYUI_FLAGS=" on a machine with a GPU takes that."""
MODELS = ("checkpoints", "configs", "diffusion_models", "loras", "text_encoders", "vae")
SETTINGS = {  # no tutorial, template browser or news; navigation that 1.27 can set without an error of its own
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.27.10",
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Canvas.NavigationMode": "custom",
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # text at every zoom, for screenshots
}


class RequestFailed(RuntimeError):
    """The server's answer is an error: `status` is HTTP's, `answer` what came with it."""

    def __init__(self, method: str, path: str, status: int, answer: Any) -> None:
        super().__init__(f"{method} {path} gave {status}: {answer}")
        self.status = status
        self.answer = answer


class PromptRefused(RuntimeError):
    """The prompt did not pass ComfyUI's check; `node_errors` is by node id."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        super().__init__(json.dumps(answer, indent=1))
        self.node_errors: dict[str, Any] = dict(answer.get("node_errors") or {})


class ExecutionFailed(RuntimeError):
    """A node raised, or the prompt was interrupted (then `kind` is "interrupted")."""

    def __init__(self, kind: str, details: Mapping[str, Any]) -> None:
        message = str(details.get("exception_message", "")).strip()
        super().__init__(f"{kind} in node {details.get('node_id')} ({details.get('node_type')}): {message}")
        self.kind = kind
        self.message = message
        self.node_id = str(details.get("node_id"))
        self.node_type = str(details.get("node_type"))
        self.traceback = "".join(details.get("traceback") or [])


def find_comfyui() -> Path | None:
    """COMFYUI_PATH where it is set, else the folders above this repository, else comfy-cli's default workspace."""
    named = os.environ.get("COMFYUI_PATH")
    folders = [Path(named).expanduser()] if named else [*REPO.parents, Path.home() / "comfy" / "ComfyUI"]
    return next(
        (f.resolve() for f in folders if (f / "comfyui_version.py").is_file() and (f / "main.py").is_file()), None
    )


def find_python() -> str:
    """The interpreter that runs ComfyUI: COMFYUI_PYTHON, else the one that runs the tests."""
    return os.environ.get("COMFYUI_PYTHON") or sys.executable


@functools.cache
def why_not() -> str:
    """Why no ComfyUI can be run here, in one sentence; "" where it can."""
    root = find_comfyui()
    if root is None:
        named = os.environ.get("COMFYUI_PATH")
        return f"There is no ComfyUI in {named}." if named else "There is no ComfyUI: set COMFYUI_PATH to its folder."
    if importlib.util.find_spec("aiohttp") is None:
        return "The interpreter that runs the tests lacks aiohttp."
    lacking = _lacking(find_python(), _required(root))
    return f"{find_python()} lacks {', '.join(lacking)}, which ComfyUI or the pack needs." if lacking else ""


def _required(root: Path) -> list[str]:
    """The distributions that ComfyUI and the pack cannot do without."""
    needed = (root / "requirements.txt").read_text("utf-8").split("#non essential")[0]
    lines = [*needed.splitlines(), *(REPO / "requirements.txt").read_text("utf-8").splitlines(), "requests"]
    names = {found[0] for line in lines if (found := re.match(r"[\w.-]+", line))}
    optional = {"torchaudio"} if "0.3." in (root / "comfyui_version.py").read_text("utf-8") else set()
    return sorted(names - optional)


def _lacking(python: str, names: Sequence[str]) -> list[str]:
    """Those of the named distributions that the interpreter does not have; nothing is imported."""
    code = (
        "import sys\nfrom importlib.metadata import PackageNotFoundError, version\n"
        "for name in sys.argv[1:]:\n try:\n  version(name)\n except PackageNotFoundError:\n  print(name)"
    )
    return subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True).stdout.split()


class Events:
    """What a server sends over its WebSocket: `messages` in their order, and how many preview images came."""

    def __init__(self, url: str, client_id: str) -> None:
        self.messages: list[dict[str, Any]] = []
        self.previews = 0
        self._url = f"{url.replace('http', 'ws', 1)}/ws?clientId={client_id}"
        self._connected = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._listen()), daemon=True).start()
        if not self._connected.wait(60):
            raise TimeoutError("ComfyUI's WebSocket did not answer.")

    async def _listen(self) -> None:
        import aiohttp

        with suppress(aiohttp.ClientError, OSError):
            async with aiohttp.ClientSession() as session, session.ws_connect(self._url, max_msg_size=0) as socket_:
                async for message in socket_:
                    self._take(message.data)
                    self._connected.set()

    def _take(self, data: str | bytes) -> None:
        if isinstance(data, str):
            self.messages.append(json.loads(data))
        elif struct.unpack(">I", data[:4])[0] in (1, 4):  # a preview image, with metadata in the latter
            self.previews += 1

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The data of all messages of a type, such as "progress" or an event of our own."""
        return [m.get("data") or {} for m in list(self.messages) if m.get("type") == kind]

    def wait_for(self, kind: str, timeout: float = 60, number: int = 1) -> dict[str, Any]:
        """The data of the n-th message of a type, once it has come."""
        _until(lambda: len(self.of(kind)) >= number, timeout, f"the event {kind}")
        return self.of(kind)[number - 1]


class ComfyServer:
    """A ComfyUI that runs from `with` to its end, on `base`, a temporary folder that goes with it unless it is given.

    packs: the custom nodes by the name of their folder; arguments: more of ComfyUI's own; threads: OMP_NUM_THREADS.
    """

    def __init__(
        self,
        packs: Mapping[str, Path] | None = None,
        base: Path | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        threads: int = 1,
    ) -> None:
        self._own_base = base is None
        self.base = (base or Path(tempfile.mkdtemp(prefix="comfyui-"))).resolve()
        self.packs = {"dgpo": REPO} if packs is None else dict(packs)
        self.client_id = uuid.uuid4().hex
        self._arguments = list(arguments)
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        self._make_base()
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._own_base:
            shutil.rmtree(self.base, ignore_errors=True)

    def _make_base(self) -> None:
        folders = ("custom_nodes", "input", "output", "temp", "user/default", *(f"models/{name}" for name in MODELS))
        for folder in folders:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        (self.base / "user/default/comfy.settings.json").write_text(json.dumps(SETTINGS), "utf-8")
        for name, folder in self.packs.items():
            link = self.base / "custom_nodes" / name
            if not link.is_symlink():
                link.symlink_to(folder.resolve(), target_is_directory=True)

    def start(self) -> None:
        """Returns once the server answers; fails with the end of its log where it does not."""
        if why_not():
            raise RuntimeError(why_not())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [find_python(), "-u", "main.py", *FLAGS, "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--port", str(self.port), "--base-directory", str(self.base)]
        command += ["--database-url", f"sqlite:///{self.base}/user/comfyui.db", *self._arguments]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=find_comfyui(),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._until(self._answers, START, "ComfyUI's start")
        self.events = Events(self.url, self.client_id)

    def stop(self, kill: bool = False) -> None:
        """Ends the server; with `kill` as a power cut would."""
        if self._process is None:
            return
        self._process.kill() if kill else self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def restart(self, kill: bool = False) -> None:
        """A new process on the same folder: what was kept in memory is gone."""
        self.stop(kill)
        self.start()

    @property
    def log_path(self) -> Path:
        return self.base / "server.log"

    def log(self) -> str:
        """All that the server has printed."""
        return self.log_path.read_text("utf-8", errors="replace")

    def _answers(self) -> bool:
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            return bool(self.object_info())
        return False

    def _until(self, done: Callable[[], Any], timeout: float, what: str) -> Any:
        """The first true value of `done`; fails with the end of the log where the server dies or time runs out."""

        def alive() -> Any:
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended before {what}:\n{self.log()[-4000:]}")
            return done()

        try:
            return _until(alive, timeout, what)
        except TimeoutError as error:
            raise TimeoutError(f"{error} The end of ComfyUI's log:\n{self.log()[-4000:]}") from None

    def request(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        """The answer: parsed where it is JSON, else bytes."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind} if body else {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return _parse(answer.headers.get_content_type(), answer.read())
        except urllib.error.HTTPError as error:
            answer = _parse(error.headers.get_content_type(), error.read())
            raise RequestFailed(method, path, error.code, answer) from None

    def get(self, path: str, **query: str) -> Any:
        """GET of a route, such as `get("/history")`."""
        return self.request("GET", f"{path}?{urllib.parse.urlencode(query)}" if query else path)

    def post(self, path: str, data: Any = None) -> Any:
        """POST of JSON to a route."""
        return self.request("POST", path, json.dumps({} if data is None else data).encode())

    def object_info(self) -> dict[str, Any]:
        """All nodes by id, as the front end sees them."""
        return self.get("/object_info")

    def queue(self, prompt: Mapping[str, Any], client_id: str | None = None) -> str:
        """Queues a graph in API format and returns its prompt id; raises PromptRefused with the errors by node."""
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": client_id or self.client_id})["prompt_id"]
        except RequestFailed as error:
            if error.status != 400 or not isinstance(error.answer, dict):
                raise
            raise PromptRefused(error.answer) from None

    def wait(self, prompt_id: str, timeout: float = 600, allow_failure: bool = False) -> dict[str, Any]:
        """The history entry of a prompt that has ended; raises ExecutionFailed unless failing is allowed."""
        entry = self._until(lambda: self.get(f"/history/{prompt_id}").get(prompt_id), timeout, f"prompt {prompt_id}")
        for kind, details in (entry.get("status") or {}).get("messages", []):
            if kind in ("execution_error", "execution_interrupted") and not allow_failure:
                raise ExecutionFailed(kind.removeprefix("execution_"), details)
        return entry

    def run(self, prompt: Mapping[str, Any], timeout: float = 600, allow_failure: bool = False) -> dict[str, Any]:
        """`queue` and `wait`."""
        return self.wait(self.queue(prompt), timeout, allow_failure)

    def interrupt(self) -> None:
        """Stops the prompt that is running."""
        self.post("/interrupt")

    def free(self) -> None:
        """Unloads the models and forgets all cached results, when the worker next looks."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def view(self, image: Mapping[str, str]) -> Image.Image:
        """An image by its {filename, subfolder, type}, as nodes give them out."""
        return Image.open(io.BytesIO(self.get("/view", **image)))

    def upload(self, image: Image.Image, name: str) -> str:
        """Puts an image into the input folder and returns the name that LoadImage takes."""
        png, border = io.BytesIO(), uuid.uuid4().hex
        image.save(png, "PNG")
        head = f'--{border}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
        body = head.encode() + png.getvalue() + f"\r\n--{border}--\r\n".encode()
        return self.request("POST", "/upload/image", body, f"multipart/form-data; boundary={border}")["name"]


def images(entry: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The images of a history entry, for `view`."""
    for output in entry["outputs"].values():
        yield from output.get("images", [])


def _parse(kind: str, body: bytes) -> Any:
    return json.loads(body) if kind == "application/json" and body else body


def _until(done: Callable[[], Any], timeout: float, what: str) -> Any:
    end = time.monotonic() + timeout
    while not (value := done()):
        if time.monotonic() > end:
            raise TimeoutError(f"Waited {timeout:.0f} s for {what} in vain.")
        time.sleep(0.1)
    return value


def run_script(script: Path, timeout: float, *arguments: str, **environment: str) -> Any:
    """What a script that works inside ComfyUI, without its server, prints last: one line of JSON."""
    ran = subprocess.run(
        [find_python(), str(script), *arguments, *FLAGS],
        cwd=find_comfyui(),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])
