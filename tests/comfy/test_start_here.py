"""From an empty ComfyUI to a better LoRA by clicks alone, in the real front end, with the embedded model.

DGPO_SCREENSHOTS: a folder for the pictures of the way, by front end; those of the README are of the classic nodes of
ComfyUI 0.33.0 (tests/helpers/pictures.py).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_browser import Browser
from comfy_server import ComfyServer

MOST_CLICKS = 5
ROUNDS = 5  # until Finish now is pressed
SET = """values => { const node = app.graph.nodes.find(({ type }) => type === 'DGPO_Teach')
    for (const [name, value] of Object.entries(values)) node.widgets.find(widget => widget.name === name).value = value
}"""
PATIENT = {"minutes": 60}  # also on a machine that has much to do
HTML = "[data-node-id]"  # nodes of Nodes 2.0
TEMPLATES = '.templates-tab-button, [aria-label*="emplates"]'
CARD = '[data-testid="template-workflow-start_here"]'
RUN = '[data-testid="queue-button"]'
BUTTON = """name => {
    const node = app.graph.nodes.find(({ type }) => type === 'DGPO_Teach')
    const widget = node.widgets.find(widget => widget.name === name)
    const { left, top } = app.canvas.canvas.getBoundingClientRect()
    const { scale, offset } = app.canvas.ds
    const at = [node.pos[0] + node.size[0] / 2, node.pos[1] + (widget.y ?? widget.last_y) + 10]
    return [left + (at[0] + offset[0]) * scale, top + (at[1] + offset[1]) * scale]
}"""
ZOOM = "() => app.canvas.ds.scale"
SAID = """() => Object.fromEntries(app.graph.nodes.map(({ type, widgets }) =>
    [type, widgets?.find(({ name }) => name === 'said')?.value]))"""


class Walk:
    """Counts the clicks, and keeps a picture after each."""

    def __init__(self, browser: Browser, folder: Path) -> None:
        self.browser, self.folder, self.clicks = browser, folder, 0

    def click(self, name: str, selector: str = "", at: tuple[float, float] | None = None) -> None:
        self.clicks += 1
        page = self.browser.page
        page.mouse.click(*at) if at else page.locator(selector).first.click()
        page.wait_for_timeout(2000)
        self.keep(name)

    def keep(self, name: str) -> None:
        self.browser.screenshot(self.folder / f"walk_{self.clicks}_{name}.png")


def pictures_shown(browser: Browser) -> int:
    """How many pictures are seen on Teach in Nodes 2.0."""
    found = browser.page.locator(f"{HTML}:has-text('Finish now') img").all()
    return sum(picture.is_visible() for picture in found)


def kept(comfy: ComfyServer, run: str) -> int:
    """How many rounds of the training are on the disk."""
    paths = list((comfy.base / "output" / "dgpo" / run).glob("*/run.json"))
    return len(json.loads(paths[0].read_text("utf-8"))["states"]) if paths else 0


@pytest.fixture
def small_screen(_chromium: Browser, comfy: ComfyServer) -> Browser:
    """1440 x 900, and nothing on it."""
    _chromium.open(comfy)
    _chromium.page.set_viewport_size({"width": 1440, "height": 900})
    _chromium.page.wait_for_timeout(500)
    return _chromium


@pytest.fixture
def renderer(request: pytest.FixtureRequest, small_screen: Browser) -> Iterator[str]:
    """The nodes as the front end draws them: on the canvas, or as Nodes 2.0."""
    small_screen.set_setting("Comfy.VueNodes.Enabled", request.param == "newer")
    yield request.param
    small_screen.set_setting("Comfy.VueNodes.Enabled", False)


@pytest.mark.slow
@pytest.mark.parametrize("renderer", ["classic", "newer"], indirect=True)
def test_five_clicks_lead_from_an_empty_comfyui_to_a_better_lora(
    comfy: ComfyServer, small_screen: Browser, renderer: str, tmp_path: Path
) -> None:
    run = "teach" if renderer == "classic" else "teach_newer"
    walk = Walk(small_screen, Path(os.environ.get("DGPO_SCREENSHOTS", tmp_path)) / renderer)
    walk.click("templates", TEMPLATES)
    pack = small_screen.page.get_by_text("dgpo", exact=True).last
    walk.clicks += 1
    pack.click()
    small_screen.page.wait_for_timeout(1500)
    walk.keep("pack")
    walk.click("open", CARD)
    assert small_screen.evaluate(ZOOM) > 0.8  # as the front end opens it: text is read without zooming
    assert small_screen.red_nodes() == []
    if renderer == "newer" and not small_screen.page.locator(HTML).count():
        pytest.skip("This front end draws nodes on the canvas only.")
    small_screen.evaluate(SET, {**PATIENT, "run": run, "run_seed": int(renderer == "newer")})
    before = set(comfy.get("/history"))
    walk.click("run", RUN)

    end = time.monotonic() + 900
    while kept(comfy, run) < ROUNDS:
        assert time.monotonic() < end, comfy.log()[-2000:]
        small_screen.page.wait_for_timeout(500)
    walk.keep("training")
    if renderer == "newer":
        assert pictures_shown(small_screen) == 1  # while it trains
        walk.click("finish", f"{HTML} button:has-text('Finish now')")
    else:
        walk.click("finish", at=tuple(small_screen.evaluate(BUTTON, "Finish now")))
    while not (done := set(comfy.get("/history")) - before):
        assert time.monotonic() < end, comfy.log()[-2000:]
        small_screen.page.wait_for_timeout(500)
    small_screen.page.mouse.move(720, 860)  # else the button's tooltip is in the picture
    small_screen.page.wait_for_timeout(2500)
    walk.keep("done")

    assert walk.clicks <= MOST_CLICKS
    (prompt,) = done
    outputs = comfy.get(f"/history/{prompt}")[prompt]["outputs"]
    if renderer == "newer":
        assert pictures_shown(small_screen) == 1
    said = small_screen.evaluate(SAID)
    assert re.match(r"Finished at \d+, as you asked: Run goes on\.\n\d+ rounds done\.", said["DGPO_Teach"])
    (saved,) = (output["text"][0] for output in outputs.values() if "loras" not in output and len(output) == 1)
    assert said["DGPO_SaveLoRA"] == f"Saved as output/loras/{saved}"
    assert (comfy.base / "output" / "loras" / saved).is_file()
    gain = re.search(r"\(([+-][\d.]+)\)", said["DGPO_Teach"])
    assert gain is not None
    assert float(gain[1]) > 0
    assert small_screen.errors() == []
