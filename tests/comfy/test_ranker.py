"""Human Ranker in a real ComfyUI: asked and answered over HTTP, and in the real front end.

DGPO_SCREENSHOTS: a folder for pictures of the dialog.
"""

import json
import os
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from comfy_browser import READY, Browser
from comfy_server import REPO, ComfyServer, Events, ExecutionFailed, PromptRefused, RequestFailed
from PIL import Image

from dgpo_core.people.gallery import read_gallery

GROUPS = REPO / "tests" / "comfy" / "packs" / "comfy_groups"
OPEN = ".dgpo-ranker[open]"
new = count()  # no two tests ask about the same images


@pytest.fixture(scope="module")
def server(_comfyui: None) -> Iterator[ComfyServer]:
    with ComfyServer({"dgpo": REPO, "test_groups": GROUPS}) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_waits(server: ComfyServer) -> Iterator[None]:
    """A test that failed does not leave its question to the next."""
    yield
    while server.get("/queue")["queue_running"]:
        server.interrupt()
        time.sleep(0.3)


@pytest.fixture
def page(_chromium: Browser, server: ComfyServer) -> Browser:
    """The front end of this module's server."""
    _chromium.open(server)
    return _chromium


def a_graph(groups: int = 2, size: int = 4, variant: int | None = None, **inputs: Any) -> dict[str, Any]:
    """Groups of pictures, the ranker, and a node that tells the scores; `reward=True` connects one."""
    drawn = {"groups": groups, "size": size, "height": 128, "width": 128}
    drawn["variant"] = next(new) if variant is None else variant
    asked = {"mode": "rank", "timeout": 120, "on_timeout": "skip the update", "preset": "", **inputs}
    if asked.pop("reward", False):
        asked["reward"] = ["4", 0]
    return {
        "1": {"class_type": "TestGroups", "inputs": drawn},
        "2": {"class_type": "DGPO_HumanRanker", "inputs": {"groups": ["1", 0], **asked}},
        "3": {"class_type": "TestScores", "inputs": {"groups": ["2", 0], "best": ["2", 1]}},
        "4": {"class_type": "TestReward", "inputs": {}},
    }


def the_question(server: ComfyServer, prompt_id: str) -> dict[str, Any]:
    """The question of a prompt, once it is asked."""

    def asked() -> list[dict[str, Any]]:
        return [q for q in server.get("/dgpo/questions")["questions"] if q["prompt_id"] == prompt_id]

    end = time.monotonic() + 60
    while not asked():
        assert time.monotonic() < end, server.log()[-2000:]
        time.sleep(0.1)
    return asked()[0]


def answer(server: ComfyServer, question: dict[str, Any], *groups: dict[str, Any]) -> None:
    token = question["token"]
    server.post(f"/dgpo/questions/{token}", {"token": token, "groups": groups})


def scores(entry: dict[str, Any]) -> dict[str, Any]:
    """What TestScores tells: the reward's name, the scores by group and the shape of the best images."""
    return json.loads(entry["outputs"]["3"]["text"][0])


def test_a_person_answers(server: ComfyServer) -> None:
    prompt = server.queue(a_graph())
    question = the_question(server, prompt)
    assert (question["node_id"], question["mode"]) == ("2", "rank")
    assert 100 < question["seconds_left"] <= 120
    first = question["groups"][0]
    assert first["prompt"] == "a red circle left of a blue square"
    assert [server.view(image).size for image in first["images"]] == [(128, 128)] * 4

    answer(server, question, {"ranking": [[2], [0, 1], [3]]}, {"skip": True})
    found = scores(server.wait(prompt, 30))
    assert found == {"reward": "human", "scores": [[0, 0, 1, -1], [0, 0, 0, 0]], "best": [2, 128, 128, 3]}
    assert server.get("/dgpo/questions") == {"questions": []}
    closed = {"token": question["token"], "prompt_id": prompt, "node_id": "2", "outcome": "answered"}
    assert closed in server.events.of("dgpo.question_closed")


def test_nothing_is_asked_twice(server: ComfyServer) -> None:
    variant = next(new)
    prompt = server.queue(a_graph(groups=1, variant=variant))
    answer(server, the_question(server, prompt), {"thumbs": [1, 0, 0, -1]})
    before = scores(server.wait(prompt, 30))
    (gallery,) = read_gallery(server.base / "output/dgpo/test/asked").groups[-1:]  # a folder for --groups
    assert gallery.prompt == "a red circle left of a blue square"
    assert gallery.scores == (1, 0, 0, -1)
    assert Image.open(gallery.files[0]).size == (128, 128)
    asked = len(server.events.of("dgpo.question"))
    after = scores(server.run(a_graph(groups=1, variant=variant, timeout=119), 30))  # runs again: another timeout
    assert after == before
    assert len(server.events.of("dgpo.question")) == asked


def test_who_queued_is_asked_and_all_are_told_the_end(server: ComfyServer) -> None:
    other = Events(server.url, "another-tab")
    before = len(server.events.of("dgpo.question"))
    prompt = server.queue(a_graph())
    question = the_question(server, prompt)
    assert server.events.wait_for("dgpo.question", 10, before + 1)["token"] == question["token"]
    answer(server, question, {"skip": True}, {"skip": True})
    server.wait(prompt, 30)
    assert other.wait_for("dgpo.question_closed", 10)["token"] == question["token"]
    assert other.of("dgpo.question") == []


def test_malformed_answers_are_refused(server: ComfyServer) -> None:
    prompt = server.queue(a_graph())
    address = f"/dgpo/questions/{the_question(server, prompt)['token']}"
    for body in (b"{", b"[]", b'{"groups": []}', b'{"groups": [{"ranking": [[9]]}, {"skip": true}]}', b"\xff"):
        with pytest.raises(RequestFailed) as refused:
            server.request("POST", address, body)
        assert (refused.value.status, refused.value.answer["error"][-1]) == (400, ".")
    huge = b"[" + 2**19 * b"0," + b"0]"  # ComfyUI answers nobody else while it is read
    for place, status in {address: 413, f"{address}/next": 413, "/dgpo/finish": 413, f"{address}0": 404}.items():
        with pytest.raises(RequestFailed) as refused:
            server.request("POST", place, huge if status == 413 else b'{"groups": []}')
        assert refused.value.status == status
    assert len(server.get("/dgpo/questions")["questions"]) == 1
    server.interrupt()
    server.wait(prompt, 30, allow_failure=True)


def test_an_interrupt_ends_the_wait_at_once(server: ComfyServer) -> None:
    prompt = server.queue(a_graph(timeout=0))
    question = the_question(server, prompt)
    assert question["seconds_left"] is None
    start = time.monotonic()
    server.interrupt()
    with pytest.raises(ExecutionFailed) as ended:
        server.wait(prompt, 30)
    assert ended.value.kind == "interrupted"
    assert time.monotonic() - start < 5
    with pytest.raises(RequestFailed) as late:
        answer(server, question, {"skip": True}, {"skip": True})
    assert late.value.status == 404


def test_when_time_runs_out(server: ComfyServer) -> None:
    skipped = scores(server.run(a_graph(timeout=1), 30))
    assert (skipped["reward"], skipped["scores"]) == ("human", [[0, 0, 0, 0], [0, 0, 0, 0]])

    rewarded = scores(server.run(a_graph(timeout=1, on_timeout="use a reward", reward=True), 30))
    assert rewarded["reward"] == "brightness"
    assert rewarded["scores"][0] == sorted(rewarded["scores"][0], reverse=True)

    with pytest.raises(ExecutionFailed) as ended:
        server.run(a_graph(timeout=1, on_timeout="cancel"), 30)
    assert ended.value.kind == "interrupted"


def test_a_reward_that_is_not_connected_is_told_at_once(server: ComfyServer) -> None:
    with pytest.raises(PromptRefused, match="Connect a reward"):
        server.run(a_graph(timeout=0, on_timeout="use a reward"), 30)


def test_a_preset_needs_nobody(server: ComfyServer) -> None:
    asked = len(server.events.of("dgpo.question"))
    found = scores(server.run(a_graph(preset="3>1=2>4; 3 > * > 4", timeout=0), 30))
    assert found["scores"] == [[0, 0, 1, -1], [0, 0, 1, -1]]
    assert len(server.events.of("dgpo.question")) == asked


def test_a_preset_that_is_wrong(server: ComfyServer) -> None:
    with pytest.raises(PromptRefused, match="Ranking 1 of the preset, '3>x', cannot be read"):
        server.queue(a_graph(preset="3>x; skip"))
    with pytest.raises(ExecutionFailed, match="The preset has 1 rankings for 2 groups"):
        server.run(a_graph(preset="3>1"), 30)


def test_an_answer_trains_the_embedded_model(server: ComfyServer) -> None:
    graph = json.loads((REPO / "workflows/api/human_ranking.json").read_text("utf-8"))
    prompt = server.queue(graph)
    question = the_question(server, prompt)
    size = len(question["groups"][0]["images"])
    rank = {"ranking": [[i] for i in range(size)]}
    answer(server, question, *[rank for _ in question["groups"]])
    server.wait(prompt, 300)
    assert list((server.base / "output/loras/dgpo").glob("human_ranking*.safetensors"))


# --- in the front end ------------------------------------------------------------------------------------------------


def picture(page: Browser, name: str) -> None:
    folder = os.environ.get("DGPO_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.page.wait_for_timeout(300)
        page.screenshot(Path(folder) / f"{name}.png")


def queue(page: Browser, **inputs: Any) -> str:
    """Queues the graph from the page and waits for the dialog."""
    page.load_api(a_graph(**inputs))
    (prompt,) = page.queue()
    page.page.wait_for_selector(OPEN)
    return prompt


def badges(page: Browser) -> list[str]:
    """The rank on each image; empty where it has none."""
    return page.page.locator(f"{OPEN} .dgpo-badge").all_inner_texts()


def press(page: Browser, *keys: str) -> None:
    for key in keys:
        page.page.keyboard.press(key)


def test_clicks_and_confirm_finish_the_prompt(page: Browser, server: ComfyServer) -> None:
    prompt = queue(page)
    images = page.page.locator(f"{OPEN} .dgpo-pick")
    images.nth(2).click()
    images.nth(0).click()
    images.nth(1).click(modifiers=["Shift"])
    images.nth(3).click()
    assert badges(page) == ["2", "2", "1", "3"]
    picture(page, "ranker_dark")
    page.page.get_by_role("button", name="Confirm").click()
    assert page.page.get_by_text("Group 2 of 2").is_visible()
    assert badges(page) == ["", "", "", ""]
    page.page.get_by_role("button", name="Skip group").click()
    assert scores(server.wait(prompt, 30))["scores"] == [[0, 0, 1, -1], [0, 0, 0, 0]]
    page.page.wait_for_selector(OPEN, state="detached")
    assert page.errors() == []


def test_keys_reach_the_dialog_alone(page: Browser, server: ComfyServer) -> None:
    prompt = queue(page, size=11)
    nodes = page.evaluate("() => app.graph.nodes.length")
    press(page, "2", "b", "t", "3", "1", "Backspace")  # T is for the next one alone
    assert [*badges(page)] == ["", "1", "2", "", "", "", "", "", "", "", "2"]
    press(page, "2")  # takes it back
    assert [*badges(page)] == ["", "", "1", "", "", "", "", "", "", "", "1"]
    press(page, "Backspace", "Enter", "Delete", "4", "x", "1", "Enter")
    first, second = scores(server.wait(prompt, 30))["scores"]
    # places 0; 1 and 2; 3 to 10, which is 6.5 of 10
    assert first == pytest.approx([-0.3, 1, 0.7, -0.3, -0.3, -0.3, -0.3, -0.3, -0.3, -0.3, 0.7])
    assert second == [-1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert page.evaluate("() => app.graph.nodes.length") == nodes


def test_a_reload_finds_the_question_and_the_marks(page: Browser, server: ComfyServer) -> None:
    prompt = queue(page, groups=1)
    press(page, "4", "x", "1")
    page.page.reload()
    page.page.wait_for_selector(OPEN, timeout=120_000)
    assert badges(page) == ["", "", "", "1"]
    assert page.page.get_by_text("The model learns 4 > the other two > 1.").is_visible()
    press(page, "Enter")
    assert scores(server.wait(prompt, 30))["scores"] == [[-1, 0, 0, 1]]


def test_three_favourites_of_six_are_better_than_the_others(page: Browser, server: ComfyServer) -> None:
    prompt = queue(page, groups=1, size=6)
    for index in (0, 2, 4):
        page.page.locator(f"{OPEN} .dgpo-pick").nth(index).click()
    assert page.page.get_by_text("The model learns 1 > 3 > 5 > the other three.").is_visible()
    picture(page, "ranker_favourites")
    press(page, "Enter")
    assert scores(server.wait(prompt, 30))["scores"] == [pytest.approx([1, -0.6, 0.6, -0.6, 0.2, -0.6])]


def test_pairs_by_left_and_right(page: Browser, server: ComfyServer) -> None:
    prompt = queue(page, groups=1, size=3, mode="pairs", pairs=3)
    won: dict[str, int] = dict.fromkeys("123", 0)
    for number in (1, 2, 3):
        page.page.get_by_text(f"Pair {number} of 3.").wait_for()
        left, right = page.page.locator(f"{OPEN} .dgpo-number").all_inner_texts()
        won[max(left, right)] += 1
        picture(page, f"ranker_pair_{number}")
        press(page, "ArrowLeft" if left > right else "ArrowRight")
    page.page.get_by_text("That was the last pair. The model learns 3 > 2 > 1.").wait_for()
    assert won == {"1": 0, "2": 1, "3": 2}
    press(page, "Enter")
    (found,) = scores(server.wait(prompt, 30))["scores"]
    assert found[2] == -found[0] > found[1] == 0
    assert page.errors() == []


def test_another_tab_that_is_looked_at_shows_the_question_until_it_is_answered(
    page: Browser, server: ComfyServer
) -> None:
    other = page.page.context.browser.new_page()
    other.goto(server.url)
    other.wait_for_function(READY, timeout=120_000)
    prompt = queue(page, groups=1)
    assert other.locator(OPEN).count() == 0  # who queued is asked
    other.evaluate("() => window.dispatchEvent(new Event('focus'))")
    other.wait_for_selector(OPEN)
    press(page, "2", "Enter")
    server.wait(prompt, 30)
    other.wait_for_selector(OPEN, state="detached")
    other.get_by_text("answered elsewhere").wait_for()


def test_put_aside_and_taken_up_again(page: Browser, server: ComfyServer) -> None:
    prompt = queue(page, groups=1)
    press(page, "3", "Escape")
    page.page.wait_for_selector(OPEN, state="hidden")
    picture(page, "ranker_aside")
    page.page.get_by_role("button", name="DGPO is waiting for you").click()
    assert badges(page) == ["", "", "1", ""]
    press(page, "Escape")
    server.interrupt()
    server.wait(prompt, 30, allow_failure=True)
    page.page.get_by_text("The run was cancelled.").wait_for()
    assert not page.page.locator(".dgpo-waiting").is_visible()


def test_thumbs_and_the_enlarged_view_in_the_light_theme(page: Browser, server: ComfyServer) -> None:
    page.set_dark(False)
    prompt = queue(page, groups=1, mode="thumbs")
    images = page.page.locator(f"{OPEN} .dgpo-pick")
    images.nth(0).click()
    images.nth(1).click(click_count=2)
    images.nth(2).click(click_count=3)
    page.page.get_by_role("button", name="Image 4 is good").click()
    labels = [images.nth(i).get_attribute("aria-label") for i in range(4)]
    assert labels == ["Image 1, thumb up", "Image 2, thumb down", "Image 3, no thumb", "Image 4, thumb up"]
    picture(page, "ranker_thumbs_light")
    images.nth(1).focus()
    press(page, "Space", "ArrowRight")
    assert page.page.get_by_text("Image 3 of 4, no thumb").is_visible()
    picture(page, "ranker_enlarged_light")
    press(page, "Space")
    assert page.evaluate("() => document.activeElement.dataset.index") == "2"
    press(page, "Enter")
    assert scores(server.wait(prompt, 30))["scores"] == [[1, -1, 0, 1]]
    page.set_dark(True)


def test_confirming_nothing_asks_for_a_mark(page: Browser, server: ComfyServer) -> None:
    prompt = queue(page, groups=1)
    press(page, "Enter")
    assert page.page.get_by_text("Mark at least one image, or skip the group.").is_visible()
    press(page, "s")
    assert scores(server.wait(prompt, 30))["scores"] == [[0, 0, 0, 0]]


def test_tab_stays_within_the_dialog(page: Browser, server: ComfyServer) -> None:
    queue(page, groups=1)
    within = "() => !!document.activeElement.closest('.dgpo-ranker')"
    focused = []
    for _ in range(12):
        press(page, "Tab")
        focused.append(page.evaluate(within))
    press(page, *["Shift+Tab"] * 12)
    assert all(focused)
    assert page.evaluate(within)


def test_touch_picks_and_a_long_press_marks_the_worst(page: Browser, server: ComfyServer) -> None:
    prompt = server.queue(a_graph(groups=1))
    phone = page.page.context.browser.new_page(viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True)
    phone.goto(server.url)
    phone.wait_for_selector(OPEN, timeout=120_000)
    images = phone.locator(f"{OPEN} .dgpo-pick")
    images.nth(3).tap()
    images.nth(0).tap()

    box = images.nth(2).bounding_box()
    touch = phone.context.new_cdp_session(phone)
    point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
    phone.wait_for_timeout(800)
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    phone.wait_for_timeout(300)
    assert images.nth(2).get_attribute("aria-label") == "Image 3, worst"
    phone.get_by_role("button", name="Enlarge image 3").tap()
    assert phone.get_by_text("Image 3 of 4, worst").is_visible()
    phone.locator(".dgpo-lightbox img").tap()
    assert phone.locator(f"{OPEN} .dgpo-badge").all_inner_texts() == ["2", "", "", "1"]

    phone.get_by_role("button", name="Confirm").tap()
    assert scores(server.wait(prompt, 30))["scores"] == [pytest.approx([1 / 3, -1 / 3, -1, 1])]
