"""The dialog in a real browser, on the headless page: what clicks, keys and fingers say, and what it says back.

DGPO_SCREENSHOTS: a folder for pictures of it.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_browser import ARGUMENTS, find_chromium, why_no_browser
from PIL import Image, ImageDraw, ImageFont

from dgpo_core.method.rollout import nothing
from dgpo_core.people.questions import Answer, AskedGroup, Question, Questions
from dgpo_core.people.server import AskingServer

OPEN = ".dgpo-ranker[open]"
WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 400, "height": 800}


class Asked:
    """A question on a page of its own; `page` is Playwright's."""

    def __init__(self, folder: Path, browser: Any, sizes: tuple[int, ...], mode: str, **page: Any) -> None:
        self.answer: Answer | None = None
        names = [[f"{g}-{i}.png" for i in range(size)] for g, size in enumerate(sizes)]
        for row in names:
            for i, name in enumerate(row):
                picture(i).save(folder / name)
        groups = tuple(AskedGroup("a red fox in the snow", tuple({"filename": name} for name in row)) for row in names)
        self.questions = Questions(lambda event, data: None)
        self.server = AskingServer(self.questions, folder, 0)
        self.thread = threading.Thread(target=self._ask, args=(Question({}, groups, mode),), daemon=True)
        self.thread.start()
        self.wrong: list[str] = []
        self.page = browser.new_page(**{"viewport": WIDE, **page})
        self.page.on("console", lambda m: m.type == "error" and self.wrong.append(m.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.goto(self.server.url)
        self.page.wait_for_selector(f"{OPEN} .dgpo-pick")

    def _ask(self, question: Question) -> None:
        self.answer = self.questions.ask(question, 0, nothing)

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
    if why_no_browser():
        pytest.skip(why_no_browser())
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        yield browser
        browser.close()


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


# --- what is learned -------------------------------------------------------------------------------------------------


def test_three_clicked_favourites_are_better_than_the_others_and_the_hint_says_so(ask: Any) -> None:
    asked = ask(6)
    assert asked.hint().startswith("Click the best image, then the next best; right click the worst.")
    for index in (1, 3, 5):
        asked.pick(index).click()
    assert asked.hint() == "The model learns 2 > 4 > 6 > the other three."
    asked.shoot("page_three_favourites")
    asked.press("Enter")
    assert asked.said() == [{"ranking": [[1], [3], [5]]}]


def test_the_worst_are_marked_by_the_other_button_or_x_and_lie_below_the_others(ask: Any) -> None:
    asked = ask(6)
    asked.pick(4).click(button="right")
    assert asked.hint() == "The model learns the other five > 5."
    asked.press("2", "x", "1")  # X: the next one is the worst, not those after it
    asked.press("3")
    assert asked.badges() == ["✕", "1", "2", "", "✕", ""]
    assert asked.hint() == "The model learns 2 > 3 > the other two > 1 = 5."
    asked.pick(4).click(button="right")  # no more
    asked.pick(0).click()  # the worst no more, but the third
    assert asked.hint() == "The model learns 2 > 3 > 1 > the other three."
    asked.press("Backspace", "Enter")
    assert asked.said() == [{"ranking": [[1], [2]], "worst": [0]}]


def test_an_image_that_arrow_keys_went_to_is_the_worst_by_x(ask: Any) -> None:
    asked = ask(4)
    asked.press("ArrowRight", "ArrowRight", "x", "Enter")
    assert asked.said() == [{"ranking": [], "worst": [1]}]


def test_all_images_in_one_rank_teach_nothing_and_it_is_said(ask: Any) -> None:
    asked = ask(2)
    asked.press("1", "t", "2")
    assert asked.hint() == "The model learns nothing: all images count the same."


def test_a_tie_is_of_one_image_alone(ask: Any) -> None:
    asked = ask(4)
    asked.press("3", "1", "t", "2", "4")
    assert asked.badges() == ["2", "2", "1", "3"]
    assert asked.hint() == "The model learns 3 > 1 = 2 > 4."


def test_thumbs_say_what_is_learned_and_the_other_button_is_a_thumb_down(ask: Any) -> None:
    asked = ask(5, mode="thumbs")
    asked.pick(0).click()
    asked.pick(1).click(button="right")
    asked.press("x", "3", "4")
    assert asked.hint() == "The model learns 1 = 4 > the other one > 2 = 3."
    asked.press("Enter")
    assert asked.said() == [{"thumbs": [1, -1, -1, 1, 0]}]


# --- looking ---------------------------------------------------------------------------------------------------------


def test_the_enlarged_view_opens_at_the_first_image_and_marks_from_there(ask: Any) -> None:
    asked = ask(4)
    asked.press("Space")
    assert asked.page.get_by_text("Image 1 of 4, no rank").is_visible()
    asked.press("ArrowRight", "x")
    assert asked.page.get_by_text("Image 2 of 4, worst").is_visible()
    asked.press("ArrowLeft", "ArrowLeft")
    assert asked.page.get_by_text("Image 4 of 4, no rank").is_visible()
    asked.press("Escape", "1", "Enter")
    assert asked.said() == [{"ranking": [[0]], "worst": [1]}]


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("mode", ["rank", "thumbs", "pairs"])
@pytest.mark.parametrize("width", ["wide", "narrow"])
def test_24_images_can_be_judged_on_a_wide_and_on_a_narrow_screen(ask: Any, theme: str, mode: str, width: str) -> None:
    """Nothing sticks out sideways, no label is cut off; images are large enough, and every button can be hit."""
    asked = ask(24, mode=mode, color_scheme=theme, viewport=WIDE if width == "wide" else NARROW)
    if mode == "pairs":
        for _ in range(5):
            asked.choose("ArrowLeft")
    else:
        asked.press("3", "a", "b", "x", "5")
    asked.shoot(f"page_24_{mode}_{width}_{theme}")
    wrong = """() => [...document.querySelectorAll(".dgpo-ranker[open] :is(button, p)")].filter((one) => {
        const {left, right} = one.getBoundingClientRect()
        return one.offsetParent && (left < 0 || right > innerWidth + 0.5 || one.scrollWidth > one.clientWidth)
    }).map((one) => one.textContent)"""
    assert asked.page.evaluate(wrong) == []
    sizes = [pick.bounding_box()["width"] for pick in asked.page.locator(f"{OPEN} .dgpo-pick").all()]
    assert min(sizes) >= (240 if mode == "pairs" else 150)
    for button in asked.page.locator(f"{OPEN} .dgpo-foot button:visible").all():
        assert button.bounding_box()["height"] >= 40
    assert asked.page.locator(f"{OPEN} .dgpo-foot").bounding_box()["height"] < 240
    assert asked.wrong == []


def test_a_finger_ranks_and_holds_the_worst(ask: Any) -> None:
    asked = ask(4, viewport=NARROW, has_touch=True, is_mobile=True)
    assert asked.hint().startswith("Tap the best image, then the next best. Hold one that is the worst.")
    asked.pick(3).tap()
    box = asked.pick(1).bounding_box()
    touch = asked.page.context.new_cdp_session(asked.page)
    point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
    asked.page.wait_for_timeout(800)
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    asked.pick(2).tap()
    assert asked.badges() == ["", "✕", "2", "1"]
    asked.shoot("page_touch")
    asked.page.get_by_role("button", name="Confirm").tap()
    assert asked.said() == [{"ranking": [[3], [2]], "worst": [1]}]


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_by_keys_alone_the_next_at_once_and_the_next_group_after_the_last(ask: Any) -> None:
    asked = ask(3, 4, mode="pairs")
    said = []
    assert asked.hint() == "Pair 1 of 3. Which one is better? Click it."
    left, right = asked.choose("ArrowRight")
    said.append([right, ">", left])
    assert asked.hint().startswith(f"Pair 2 of 3. The model learns {right + 1} > the other one > {left + 1}.")
    asked.shoot("page_pairs")
    left, right = asked.choose("t")
    said.append([left, "=", right])
    left, right = asked.choose("s")
    said.append([left, "?", right])
    assert asked.page.get_by_text("Group 2 of 2").is_visible()
    for _ in range(6):
        asked.choose("ArrowLeft")
    assert asked.hint().startswith("That was the last pair. The model learns ")
    assert asked.badges()[0] == "1"
    asked.shoot("page_pairs_end")
    asked.press("Enter")
    first, second = asked.said()
    assert first == {"pairs": said}
    assert len(second["pairs"]) == 6


def test_a_pair_is_taken_back_and_a_group_confirmed_early(ask: Any) -> None:
    asked = ask(4, mode="pairs")
    pair = asked.choose("ArrowLeft")
    asked.choose("ArrowLeft")
    asked.choose("Backspace")
    assert asked.choose("Backspace")
    assert asked.hint().startswith("Pair 1 of 6.")
    asked.press("Enter")
    assert asked.hint() == "Choose in at least one pair, or skip the group."
    asked.pick(pair[1]).click()
    wait_for(lambda: asked.hint().startswith("Pair 2 of 6."))
    asked.press("Enter")
    assert asked.said() == [{"pairs": [[pair[1], ">", pair[0]]]}]


def test_a_reload_goes_on_with_the_same_pair(ask: Any) -> None:
    asked = ask(5, mode="pairs")
    asked.choose("ArrowLeft")
    asked.choose("ArrowRight")
    before = asked.hint()
    asked.page.reload()
    asked.page.wait_for_selector(f"{OPEN} .dgpo-pick")
    assert asked.hint() == before


def test_a_pair_that_did_not_come_is_asked_for_again_and_nothing_is_said_twice(ask: Any) -> None:
    asked = ask(4, mode="pairs")
    asked.page.route("**/next*", lambda route: route.abort())
    asked.press("ArrowLeft")
    wait_for(lambda: asked.hint() == "The training did not answer. What you said is kept; asking again…")
    asked.press("ArrowLeft", "Backspace")
    asked.page.unroute("**/next*")
    wait_for(lambda: asked.hint().startswith("Pair 2 of 6. The model learns "))
    asked.press("Enter")
    asked.wrong.clear()  # the browser's own note of what was aborted
    (said,) = asked.said()
    assert len(said["pairs"]) == 1


def test_pairs_are_tapped_on_a_phone(ask: Any) -> None:
    asked = ask(2, mode="pairs", viewport=NARROW, has_touch=True, is_mobile=True)
    asked.shoot("page_pairs_touch")
    asked.pick(1).tap()
    wait_for(lambda: asked.hint().startswith("That was the last pair. The model learns 2 > 1."))
    asked.page.get_by_role("button", name="Confirm").tap()
    assert asked.said() == [{"pairs": [[1, ">", 0]]}]


def test_an_enlarged_pair_is_turned_by_arrow_keys(ask: Any) -> None:
    asked = ask(6, mode="pairs")
    left, right = (int(pick.get_attribute("data-index")) for pick in asked.page.locator(f"{OPEN} .dgpo-pick").all())
    asked.press("Space")
    assert asked.page.get_by_text(f"Image {left + 1} of 6, left").is_visible()
    asked.press("ArrowRight")
    assert asked.page.get_by_text(f"Image {right + 1} of 6, right").is_visible()
    asked.press("Escape")
    assert asked.hint().startswith("Pair 1 of 9.")
