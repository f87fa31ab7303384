"""Records the pictures of the pages anew: `python tests/helpers/pictures.py [name ...]`; thumbnails: `cards.py`.

A name is a template's, or `walk` with the folder that tests/comfy/test_start_here.py kept its pictures in:
`DGPO_SCREENSHOTS=FOLDER pytest tests/comfy/test_start_here.py`, then `pictures.py walk --folder FOLDER/classic`. Run it
with the newest ComfyUI. Look at what has changed before you commit it: messages of the front end come and go.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_browser import Browser
from comfy_server import REPO, ComfyServer, find_comfyui
from PIL import Image

WORKFLOWS, PAGES = REPO / "workflows", REPO / "nodes" / "web" / "docs" / "images"
WALK = ("walk_2_pack", "walk_3_open", "walk_4_training", "walk_5_done")
PRESSES = {"quickstart": 1, "visual_loop": 3}  # of Run, before the picture
MARGIN = 24  # pixels
WINDOW = (1900, 1100)
LONG = 1800  # seconds
PLACE = """() => {
    const boxes = [...app.graph.groups, ...app.graph.nodes].map(item => item.boundingRect ?? item._bounding)
    const { scale, offset } = app.canvas.ds, { left, top } = app.canvas.canvas.getBoundingClientRect()
    const low = i => Math.min(...boxes.map(box => box[i]))
    const high = i => Math.max(...boxes.map(box => box[i] + box[i + 2]))
    return [left + (low(0) + offset[0]) * scale, top + (low(1) + offset[1]) * scale,
        left + (high(0) + offset[0]) * scale, top + (high(1) + offset[1]) * scale] }"""
BARE = (
    ".graph-canvas-panel .p-splitter-gutter, .side-tool-bar-container, .minimap-main-container, .p-toast, .actionbar"
    " { visibility: hidden !important }"
)


def files(server: ComfyServer, workflow: Mapping[str, Any]) -> None:
    """What a template names and a fresh base folder does not have; nobody opens the models."""
    for name, colour in (("dgpo_liked.png", "#c33"), ("dgpo_disliked.png", "#33c")):
        Image.new("RGB", (64, 64), colour).save(server.base / "input" / name)
    shutil.copy(find_comfyui() / "input" / "example.png", server.base / "input")
    offered = [model for node in workflow["nodes"] for model in node["properties"].get("models", ())]
    for model in [*offered, {"directory": "checkpoints", "name": "sd_v1-5.safetensors"}]:
        path = server.base / "models" / model["directory"] / model["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def graph(browser: Browser, folder: Path) -> Image.Image:
    """The graph alone, with a little of what is around it."""
    browser.page.wait_for_timeout(1500)
    browser.screenshot(folder / "graph.png")
    left, top, right, bottom = browser.evaluate(PLACE)
    whole = Image.open(folder / "graph.png").convert("RGB")
    box = (
        max(0, left - MARGIN),
        max(0, top - MARGIN),
        min(whole.width, right + MARGIN),
        min(whole.height, bottom + MARGIN),
    )
    return whole.crop(tuple(map(round, box)))


def record(server: ComfyServer, browser: Browser, name: str) -> None:
    """The picture of a page, of a template that was run."""
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))
    browser.load_workflow(workflow)
    browser.fit()
    for _ in range(PRESSES[name]):
        (prompt,) = browser.queue()
        server.wait(prompt, LONG)
    browser.page.wait_for_timeout(6000)  # until the front end's messages are gone
    save(graph(browser, server.base), PAGES / {"quickstart": "training.jpg"}.get(name, f"{name}.jpg"))


def walk(folder: Path) -> None:
    """Four pictures of the way in one."""
    size, gap = (792, 495), 16
    whole = Image.new("RGB", (2 * size[0] + gap, 2 * size[1] + gap), "white")
    for place, name in enumerate(WALK):
        small = Image.open(folder / f"{name}.png").convert("RGB").resize(size, Image.Resampling.LANCZOS)
        whole.paste(small, (place % 2 * (size[0] + gap), place // 2 * (size[1] + gap)))
    save(whole, PAGES / "start_here.jpg", 72)


def save(picture: Image.Image, path: Path, quality: int = 84) -> None:
    picture.save(path, quality=quality, optimize=True)
    print(f"{path.relative_to(REPO)}: {path.stat().st_size // 1000} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="templates by name (quickstart, visual_loop), or walk")
    parser.add_argument("--folder", type=Path, help="the pictures of the walk")
    options = parser.parse_args()
    if options.names == ["walk"]:
        walk(options.folder)
        return
    names = options.names or list(PRESSES)
    with ComfyServer() as server, Browser(*WINDOW) as browser:
        for name in names:
            files(server, json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8")))
        browser.open(server)
        browser.set_setting("Comfy.Minimap.Visible", False)
        browser.page.add_style_tag(content=BARE)
        for name in names:
            record(server, browser, name)


if __name__ == "__main__":
    main()
