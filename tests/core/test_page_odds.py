"""The dialog in a real browser where something is odd: the keyboard, the screen, the network, the moment it opens."""

import threading
from typing import Any

import asked_page
import pytest
from asked_page import NARROW, OPEN, wait_for

from dgpo_core.method.rollout import nothing
from dgpo_core.people.questions import AskedGroup, Question

chromium, ask = asked_page.chromium, asked_page.ask
TYPED = """([key, code, shiftKey]) => document.activeElement.dispatchEvent(
    new KeyboardEvent('keydown', {key, code, shiftKey, bubbles: true, cancelable: true}))"""
TEXT = "() => { const text = document.createElement('textarea'); document.body.append(text); text.focus() }"


def typed(asked: Any, key: str, code: str, shift: bool = False) -> None:
    """A key of another layout."""
    asked.page.evaluate(TYPED, [key, code, shift])


def test_keys_are_where_they_are_on_every_keyboard_and_shift_ties_nothing(ask: Any) -> None:
    asked = ask(4)
    typed(asked, "3", "Digit3", shift=True)  # French digits need Shift
    typed(asked, "&", "Digit1")  # and their keys type this without
    typed(asked, "ч", "KeyX")  # where X is on a Russian keyboard
    typed(asked, "é", "Digit2")
    assert asked.badges() == ["2", "✕", "1", ""]
    typed(asked, "ы", "KeyS")
    assert asked.said() == [{"skip": True}]


@pytest.mark.parametrize("mode", ["rank", "pairs"])
def test_a_skip_that_did_not_arrive_loses_nothing_and_can_be_said_again(ask: Any, mode: str) -> None:
    asked = ask(3, mode=mode)
    asked.press("2") if mode == "rank" else asked.choose("ArrowLeft")
    before, lost = asked.badges(), f"{asked.server.url.partition('?')[0]}questions/{{}}?*"
    (open_,) = asked.questions.pending()
    asked.page.route(lost.format(open_["token"]), lambda route: route.abort())
    asked.page.get_by_role("button", name="Skip group").click()
    wait_for(lambda: "Your marks are kept: confirm or skip again" in asked.hint())
    assert asked.badges() == before
    if mode == "pairs":
        asked.choose("ArrowLeft")
    asked.page.unroute(lost.format(open_["token"]))
    asked.page.get_by_role("button", name="Skip group").click()
    asked.wrong.clear()  # the browser's own note of what was aborted
    assert asked.said() == [{"skip": True}]


def test_a_list_from_before_the_answer_does_not_bring_the_question_back(ask: Any) -> None:
    asked = ask(3)
    held: list[Any] = []

    def late(route: Any) -> None:
        held.append((route, route.fetch())) if not held else route.continue_()

    asked.page.route("**/questions?*", late)
    while not held:
        asked.page.wait_for_timeout(50)
    asked.press("1", "Enter")
    asked.page.wait_for_selector(OPEN, state="detached")
    held[0][0].fulfill(response=held[0][1])
    asked.page.wait_for_timeout(300)
    assert asked.page.locator(OPEN).count() == 0
    assert asked.said() == [{"ranking": [[0]]}]


def test_of_a_pair_one_above_the_other_up_and_down_choose(ask: Any) -> None:
    asked = ask(3, mode="pairs", viewport=NARROW)
    assert asked.badges() == ["↑", "↓"]
    asked.press("Space")
    assert asked.page.get_by_text("Image 1 of 3, upper").is_visible()
    asked.press("Escape")
    upper, lower = asked.choose("ArrowUp")
    assert asked.hint().startswith(f"Pair 2 of 3. The model learns {upper + 1} > the other one > {lower + 1}.")


def test_images_that_do_not_come_have_their_place_and_can_be_picked(ask: Any) -> None:
    asked = ask(4, lost=("0-0.png", "0-2.png"))
    asked.page.wait_for_timeout(300)
    boxes = [asked.pick(i).bounding_box() for i in range(4)]
    assert {round(box["width"]) for box in boxes} == {round(box["height"]) for box in boxes}
    asked.pick(2).click()
    asked.press("Enter")
    asked.wrong.clear()  # the browser's own note of what is not there
    assert asked.said() == [{"ranking": [[2]]}]


def test_what_is_being_typed_when_the_question_comes_is_no_answer(ask: Any) -> None:
    asked = ask(3)
    asked.press("1", "Enter")
    asked.said()
    asked.page.wait_for_selector(OPEN, state="detached")  # else its images are taken for those of the next question
    asked.page.evaluate(TEXT)
    groups = (AskedGroup("a red fox", tuple({"filename": f"0-{i}.png"} for i in range(3))),)
    threading.Thread(target=asked.questions.ask, args=(Question({}, groups), 0, nothing), daemon=True).start()
    asked.page.wait_for_selector(f"{OPEN} .dgpo-pick")
    asked.page.keyboard.type("cats 1", delay=30)
    assert asked.badges() == ["", "", ""]
    assert asked.hint() == "Keys count here once you have stopped typing for a moment."
    asked.page.wait_for_timeout(1100)
    asked.press("2", "s")
    asked.page.wait_for_selector(OPEN, state="detached")
    assert asked.page.evaluate("() => document.activeElement.tagName") == "TEXTAREA"  # where it was


@pytest.mark.parametrize(("width", "height"), [(740, 360), (320, 568), (360, 225)])
def test_on_a_small_screen_images_and_buttons_can_be_reached(ask: Any, width: int, height: int) -> None:
    """A phone on its side, a small one, and a page that is zoomed in to 400 %."""
    asked = ask(8, 8, viewport={"width": width, "height": height}, timeout_s=600)
    asked.page.wait_for_timeout(300)
    asked.shoot(f"page_small_{width}")
    close = asked.page.get_by_role("button", name="Put aside").bounding_box()
    assert close["x"] + close["width"] <= width
    box = asked.pick(0).bounding_box()
    assert min(height, box["y"] + box["height"]) - box["y"] > 60
    confirm = asked.page.get_by_role("button", name="Confirm")
    confirm.scroll_into_view_if_needed()
    box = confirm.bounding_box()
    assert box["y"] + box["height"] <= height
