"""Before / After in the front end: a slider over the same seeds, in the classic and in the newer renderer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from comfy_browser import Browser
from comfy_graphs import POLICY, PROMPTS, SAMPLER, Graph, visual
from comfy_server import ComfyServer

PARTS = ".dgpo-compare"
STATE = """() => { const root = document.querySelector('.dgpo-compare'), pictures = [...root.querySelectorAll('img')]
    return { caption: root.querySelector('.turn span').textContent, cut: pictures[1].style.clipPath,
        height: root.querySelector('.pictures').offsetHeight, loaded: pictures.map(one => one.naturalWidth) } }"""
SLIDE = """value => { const range = document.querySelector('.dgpo-compare input')
    range.value = value; range.dispatchEvent(new Event('input')) }"""


def graph() -> Graph:
    """Two images of each of two prompts, before and after a training that has not begun."""
    whole = visual("compare")
    found = {key: whole[key] for key in (POLICY, PROMPTS, SAMPLER)}
    links: dict[str, Any] = {"policy": [POLICY, 0], "prompts": [PROMPTS, 0], "settings": [SAMPLER, 0]}
    found["compare"] = {
        "class_type": "DGPO_BeforeAfter",
        "inputs": {**links, "first": 2, "images": 2, "first_seed": 5},
    }
    return found


def compared(browser: Browser, comfy: ComfyServer) -> dict[str, Any]:
    """What the slider shows once the graph has run."""
    (prompt,) = browser.queue()
    comfy.wait(prompt)
    browser.page.wait_for_selector(f"{PARTS} .turn span", state="attached", timeout=60_000)
    browser.page.wait_for_timeout(1500)
    return browser.evaluate(STATE)


@pytest.mark.parametrize("renderer", ["classic", "newer"])
def test_a_slider_goes_from_before_to_after_and_from_pair_to_pair(
    browser: Browser, comfy: ComfyServer, renderer: str, tmp_path: Path
) -> None:
    if renderer == "newer":
        browser.set_setting("Comfy.VueNodes.Enabled", True)
    try:
        browser.load_api(graph())
        if renderer == "newer" and not browser.page.get_by_role("combobox", name="sampler").count():
            pytest.skip("This front end draws nodes on the canvas only.")  # 1.27 has the setting, but shows nothing
        found = compared(browser, comfy)
        assert found["caption"].startswith("1 of 4: ")
        assert found["caption"].endswith("(seed 5)")
        assert found["loaded"] == [64, 64]
        assert found["height"] >= 200
        assert "50%" in found["cut"]
        browser.evaluate(SLIDE, 20)
        assert "20%" in browser.evaluate(STATE)["cut"]
        browser.page.locator(f"{PARTS} button").nth(1).dispatch_event("click")
        assert "2 of 4: " in browser.evaluate(STATE)["caption"]
        browser.page.locator(f"{PARTS} button").nth(0).dispatch_event("click")
        browser.page.locator(f"{PARTS} button").nth(0).dispatch_event("click")
        assert "4 of 4: " in browser.evaluate(STATE)["caption"]
        browser.fit()
        browser.screenshot(Path(os.environ.get("DGPO_SCREENSHOTS", tmp_path)) / f"compare_{renderer}.png")
        assert browser.errors() == []
        assert "compare" not in json.dumps(browser.to_api()["compare"]["inputs"])  # the page's alone
    finally:
        if renderer == "newer":
            browser.set_setting("Comfy.VueNodes.Enabled", False)
