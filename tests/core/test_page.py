"""The dialog in a real browser, on the headless page: what clicks, keys and fingers say, and what it says back.

DGPO_SCREENSHOTS: a folder for pictures of it.
"""

from typing import Any

import asked_page
import pytest
from asked_page import NARROW, OPEN, WIDE, wait_for

chromium, ask = asked_page.chromium, asked_page.ask


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
