"""ComfyUI's real front end in a headless Chromium, for the tests: loads workflows, queues them, shows what is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyServer, PromptRefused

LONG = 120_000  # milliseconds
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing but this machine is reached
)
OWN_ERRORS = (  # what the bare front ends 1.27.10 and 1.49.6 report themselves, without any pack
    r"404.*/(user\.css|favicon\.ico)",  # files that a user may add; the icon is missing in 0.3.64
    r"404.*/api/userdata[/?]",  # settings that were never saved
    r"graph accessed before initialization",
    r"https://(huggingface\.co|api\.comfy\.org)/",  # looks up the models and nodes that a workflow names
)
READY = (
    "() => window.app?.vueAppReady && app.graph?.nodes.length && Object.keys(LiteGraph.registered_node_types).length"
)
EMPTY = {"version": 0.4, "last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "groups": []}
RED = """() => app.graph.nodes
    .filter(node => node.has_errors || app.lastNodeErrors?.[node.id] || !(node.type in LiteGraph.registered_node_types))
    .map(node => `${node.id} ${node.type}`)"""
MISSING = "() => app.graph.nodes.map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types))"
DIALOGS = '[role="dialog"], [role="alertdialog"], .p-dialog, .p-toast-message, [data-testid="error-overlay"]'


def find_chromium() -> str | None:
    """CHROMIUM where it is set, else what is on the PATH."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def why_no_browser() -> str:
    """Why the front end cannot be opened here, in one sentence; "" where it can."""
    if importlib.util.find_spec("playwright") is None:
        return "The interpreter that runs the tests lacks playwright."
    return "" if find_chromium() else "There is no Chromium: install it or set CHROMIUM to its program."


@contextmanager
def chromium_or_skip() -> Iterator[Any]:
    """Playwright's Chromium from `with` to its end, or a skip that says why there is none."""
    if why_no_browser():
        pytest.skip(why_no_browser())
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        yield browser
        browser.close()


class Browser:
    """A Chromium that runs from `with` to its end and reaches nothing but this machine; `page` is Playwright's."""

    def __init__(self, width: int = 1600, height: int = 900) -> None:
        self._size = {"width": width, "height": height}
        self._errors: list[str] = []
        self._queued: list[Any] = []

    def __enter__(self) -> Browser:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        self._chromium = self._playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        return self

    def __exit__(self, *_: object) -> None:
        self._chromium.close()
        self._playwright.stop()

    def open(self, server: ComfyServer) -> None:
        """The front end of a server in a fresh profile, with an empty graph and no error noted yet but its start's."""
        for context in self._chromium.contexts:
            context.close()
        self._errors, self._queued = [], []
        self.page = self._chromium.new_page(viewport=self._size)
        self.page.on("console", lambda m: m.type == "error" and self._errors.append(f"{m.text} ({m.location['url']})"))
        self.page.on("pageerror", lambda error: self._errors.append(f"{error}\n{error.stack}"))
        self.page.on("response", lambda r: r.url.endswith("/api/prompt") and self._queued.append(r))
        self.page.goto(server.url)
        self.page.wait_for_function(READY, timeout=LONG)
        self.load_workflow(EMPTY)

    def _settle(self) -> None:
        """Lets the front end draw and react, as it does some of its checks after loading."""
        self.page.wait_for_timeout(1000)

    def evaluate(self, code: str, value: Any = None) -> Any:
        """The JSON value that a JavaScript function of one value gives; what is undefined is left out."""
        wrapped = f"async value => JSON.stringify(await ({code})(JSON.parse(value)))"
        result = self.page.evaluate(wrapped, json.dumps(value))
        return None if result is None else json.loads(result)

    def load_workflow(self, workflow: Mapping[str, Any]) -> None:
        """Opens a workflow in the front end's own format, in a new tab of the front end."""
        self.evaluate("async workflow => { await app.loadGraphData(workflow) }", workflow)
        self._settle()

    def load_api(self, prompt: Mapping[str, Any], name: str = "test") -> None:
        """Opens a workflow in API format: the front end makes nodes, links and places of it."""
        self.evaluate("async ([prompt, name]) => { await app.loadApiJson(prompt, name) }", [prompt, name])
        self._settle()

    def to_api(self) -> dict[str, Any]:
        """The graph in API format, as the front end would queue it, without the titles that it adds."""
        prompt = self.evaluate("async () => (await app.graphToPrompt()).output")
        return {id_: {key: node[key] for key in ("class_type", "inputs")} for id_, node in prompt.items()}

    def serialize(self) -> dict[str, Any]:
        """The graph in the front end's own format."""
        return self.evaluate("() => app.graph.serialize()")

    def queue(self, count: int = 1, timeout: float = 60) -> list[str]:
        """Queues the graph `count` times, as the Run button does, for their prompt ids; raises PromptRefused."""
        before = len(self._queued)
        self.evaluate("async count => { await app.queuePrompt(0, count) }", count)
        end, ids = time.monotonic() + timeout, []
        while len(ids) < count and time.monotonic() < end:
            self.page.wait_for_timeout(100)
            answers = [response.json() for response in self._queued[before:]]
            refused = next((answer for answer in answers if "prompt_id" not in answer), None)
            if refused:
                raise PromptRefused(refused)
            ids = [answer["prompt_id"] for answer in answers]
        return ids

    def errors(self, allowed: Sequence[str] = ()) -> list[str]:
        """Errors of the console and the page since `open`, but those of the bare front end and `allowed` (patterns)."""
        patterns = [*OWN_ERRORS, *allowed]
        return [error for error in self._errors if not any(re.search(p, error, re.DOTALL) for p in patterns)]

    def red_nodes(self) -> list[str]:
        """The id and type of each node that is unknown or marked as faulty (the newer one marks missing files, too)."""
        return self.evaluate(RED)

    def missing_nodes(self) -> list[str]:
        """The types in the graph that the server does not have."""
        return self.evaluate(MISSING)

    def dialogs(self) -> list[str]:
        """The texts of all dialogs and messages that are shown, such as the one that lists missing nodes."""
        texts = [d.inner_text().strip() for d in self.page.locator(DIALOGS).all() if d.is_visible()]
        return [text for text in texts if text]

    def close_dialogs(self) -> None:
        """Closes the front end's dialogs, one by one; messages beside the graph stay."""
        for _ in range(self.page.locator(".p-dialog:visible").count()):
            self.page.keyboard.press("Escape")
            self.page.wait_for_timeout(300)

    def set_setting(self, name: str, value: Any) -> None:
        """Changes one of the front end's settings."""
        self.evaluate("async ([name, value]) => { await app.extensionManager.setting.set(name, value) }", [name, value])
        self._settle()

    def set_dark(self, dark: bool) -> None:
        """Chooses the front end's dark or light palette."""
        self.set_setting("Comfy.ColorPalette", "dark" if dark else "light")

    def fit(self) -> None:
        """Moves and zooms so that the whole graph is seen."""
        self.evaluate("async () => { await app.extensionManager.command.execute('Comfy.Canvas.FitView') }")
        self._settle()

    def screenshot(self, path: Path) -> None:
        """What is seen, as PNG or JPEG by the name's ending."""
        self.page.screenshot(path=path, timeout=LONG)
