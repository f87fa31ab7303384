"""Records the pictures of the pages and the templates' thumbnails anew: `python tests/helpers/pictures.py [name ...]`.

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
BY_HAND = ("human_ranking", "quickstart_edits")  # a dialog, and what was drawn
WALK = ("walk_2_pack", "walk_3_open", "walk_4_training", "walk_5_done")
PRESSES = {"quickstart": 1, "visual_loop": 3}  # of Run, before the picture
THUMBNAIL, MARGIN = (800, 432), 24  # pixels
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


def thumbnail(picture: Image.Image) -> Image.Image:
    """As large as it fits, on its own background."""
    small, whole = picture.copy(), Image.new("RGB", THUMBNAIL, picture.getpixel((2, 2)))
    small.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    whole.paste(small, ((whole.width - small.width) // 2, (whole.height - small.height) // 2))
    return whole


def record(server: ComfyServer, browser: Browser, name: str) -> None:
    """The thumbnail of a template, and where it is run for that the picture of its page."""
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))
    browser.load_workflow(workflow)
    browser.fit()
    for _ in range(PRESSES.get(name, 0)):
        (prompt,) = browser.queue()
        server.wait(prompt, LONG)
    if name in PRESSES:
        browser.page.wait_for_timeout(6000)  # until the front end's messages are gone
    picture = graph(browser, server.base)
    save(thumbnail(picture), WORKFLOWS / f"{name}.jpg")
    if name in PRESSES:
        page = PAGES / {"quickstart": "training.jpg"}.get(name, f"{name}.jpg")
        save(picture, page)


def walk(folder: Path) -> None:
    """Four pictures of the way in one, and the third as thumbnail."""
    size, gap = (792, 495), 16
    whole = Image.new("RGB", (2 * size[0] + gap, 2 * size[1] + gap), "white")
    for place, name in enumerate(WALK):
        small = Image.open(folder / f"{name}.png").convert("RGB").resize(size, Image.Resampling.LANCZOS)
        whole.paste(small, (place % 2 * (size[0] + gap), place // 2 * (size[1] + gap)))
    save(whole, PAGES / "start_here.jpg", 72)
    training = Image.open(folder / f"{WALK[2]}.png").convert("RGB")
    save(
        training.crop((70, 80, 1350, 880)).resize((640, 400), Image.Resampling.LANCZOS),
        WORKFLOWS / "start_here.jpg",
        78,
    )


def save(picture: Image.Image, path: Path, quality: int = 84) -> None:
    picture.save(path, quality=quality, optimize=True)
    print(f"{path.relative_to(REPO)}: {path.stat().st_size // 1000} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="templates by name, or walk; all templates without one")
    parser.add_argument("--folder", type=Path, help="the pictures of the walk")
    options = parser.parse_args()
    if options.names == ["walk"]:
        walk(options.folder)
        return
    names = options.names or [path.stem for path in sorted(WORKFLOWS.glob("*.jpg")) if path.stem not in BY_HAND]
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
