"""A question on the engine's page, in a real browser: what clicks, keys and fingers say, and what it says back.

DGPO_SCREENSHOTS: a folder for pictures of it.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from comfy_browser import chromium_or_skip
from PIL import Image, ImageDraw, ImageFont

from dgpo_core.method.rollout import nothing
from dgpo_core.people.questions import Answer, AskedGroup, Question, Questions
from dgpo_core.people.server import AskingServer

OPEN = ".dgpo-ranker[open]"
WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 400, "height": 800}


class Asked:
    """A question on a page of its own; `page` is Playwright's.

    timeout_s: as in `Questions.ask`; lost: files of images that do not come.
    """

    def __init__(
        self,
        folder: Path,
        browser: Any,
        sizes: tuple[int, ...],
        mode: str,
        timeout_s: float = 0,
        lost: Sequence[str] = (),
        **page: Any,
    ) -> None:
        self.answer: Answer | None = None
        names = [[f"{g}-{i}.png" for i in range(size)] for g, size in enumerate(sizes)]
        for row in names:
            for i, name in enumerate(row):
                picture(i).save(folder / name)
        groups = tuple(AskedGroup("a red fox in the snow", tuple({"filename": name} for name in row)) for row in names)
        self.questions = Questions(lambda event, data: None)
        self.server = AskingServer(self.questions, folder, 0)
        self.thread = threading.Thread(target=self._ask, args=(Question({}, groups, mode), timeout_s), daemon=True)
        self.thread.start()
        self.wrong: list[str] = []
        self.page = browser.new_page(**{"viewport": WIDE, **page})
        self.page.on("console", lambda m: m.type == "error" and self.wrong.append(m.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        for name in lost:
            self.page.route(f"**/images/{name}*", lambda route: route.abort())
        self.page.goto(self.server.url)
        self.page.wait_for_selector(f"{OPEN} .dgpo-pick")

    def _ask(self, question: Question, timeout_s: float) -> None:
        self.answer = self.questions.ask(question, timeout_s, nothing)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def pick(self, index: int) -> Any:
        return self.page.locator(f'{OPEN} .dgpo-pick[data-index="{index}"]')

    def badges(self) -> list[str]:
        """What is on each image; ✕ for an icon."""
        marks = self.page.locator(f"{OPEN} .dgpo-badge")
        return [marks.nth(i).inner_text() or "✕" * marks.nth(i).locator("i").count() for i in range(marks.count())]

    def hint(self) -> str:
        return self.page.locator(f"{OPEN} .dgpo-hint").inner_text()

    def choose(self, key: str) -> tuple[int, int]:
        """Answers the pair that is shown, once it is another than before; returns it as (left, right)."""
        shown = [int(pick.get_attribute("data-index")) for pick in self.page.locator(f"{OPEN} .dgpo-pick").all()]
        before = self.hint()
        self.press(key)
        wait_for(lambda: self.hint() not in (before, ""))
        return shown[0], shown[1]

    def said(self) -> list[Any]:
        """The answer, once it is given."""
        self.thread.join(20)
        assert self.answer is not None
        assert self.wrong == []
        return list(self.answer.groups)

    def shoot(self, name: str) -> None:
        folder = os.environ.get("DGPO_SCREENSHOTS")
        if folder:
            self.page.wait_for_timeout(300)
            self.page.screenshot(path=Path(folder) / f"{name}.png")


def picture(number: int) -> Image.Image:
    """A coloured plane with its number."""
    plane = Image.new("HSV", (256, 256), (number * 37 % 256, 150, 200)).convert("RGB")
    ImageDraw.Draw(plane).text((128, 128), str(number + 1), "white", ImageFont.load_default(size=120), anchor="mm")
    return plane


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A Chromium of this module's own, or a skip that says why there is none."""
    with chromium_or_skip() as browser:
        yield browser


@pytest.fixture
def ask(tmp_path: Path, chromium: Any) -> Iterator[Callable[..., Asked]]:
    made: list[Asked] = []

    def start(*sizes: int, mode: str = "rank", **page: Any) -> Asked:
        made.append(Asked(tmp_path, chromium, sizes, mode, **page))
        return made[-1]

    yield start
    for one in made:
        one.page.close()
        one.server.close()
