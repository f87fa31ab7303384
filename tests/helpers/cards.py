"""Draws the templates' thumbnails: `python tests/helpers/cards.py`. ComfyUI shows them as small squares, with a tag
over the left of the uppermost 80 pixels.

So each is a square that can be read at 200 pixels: a title, one line about the template, and pictures of the embedded
models where these train, else the way that pictures take.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

REPO = Path(__file__).parents[2]
WORKFLOWS, PAGES, DEMO = REPO / "workflows", REPO / "nodes" / "web" / "docs" / "images", REPO / "dgpo_core" / "demo"
SIDE, EDGE = 512, 24  # pixels
GROUND, QUIET = "#202024", "#b6b6be"
STEPS = (("draw", "#4795bf"), ("score", "#e0697a"), ("train", "#9b7fd4"), ("compare", "#41a058"))
"""In the colours that nodes/web/colours.js gives to what flows between the nodes."""
TILE, ROW, OTHER = 128, 166, 822  # pixels, of dgpo_core/demo/before_after.png: an image, a row, the second half
ROWS = (0, 2)  # of it


class Card(NamedTuple):
    """What is written on it, and what draws the rest on the whole below the words."""

    title: str
    line: str
    draw: Callable[[Image.Image], None]


def drawn(column: int, row: int, half: int, size: int) -> Image.Image:
    """An image of dgpo_core/demo/before_after.png, of the half before (0) or after (1), `size` pixels wide."""
    x, y = 6 + (TILE + 6) * column + OTHER * half, 44 + ROW * row
    whole = Image.open(DEMO / "before_after.png").convert("RGB")
    return whole.crop((x, y, x + TILE, y + TILE)).resize((size, size), Image.Resampling.LANCZOS)


def learned(card: Image.Image) -> None:
    """Before and after: the first images of two prompts."""
    size = (SIDE - 2 * EDGE - 24) // 4
    for half, word in enumerate(("before", "after")):
        left = EDGE + half * (2 * size + 24)
        for place in range(4):
            tile = drawn(place % 2, ROWS[place // 2], half, size - 4)
            card.paste(tile, (left + place % 2 * size, 244 + place // 2 * size))
        written(card, word, 30, QUIET, left + size, 468)


def edited(card: Image.Image) -> None:
    """Sources of three edits and what the trained editor makes of them."""
    whole = Image.open(DEMO / "edits_before_after.png").convert("RGB")
    zoom = whole.width / 1138  # places below are those of a picture this wide
    for place, y in enumerate((26, 225, 524)):
        for half, x in enumerate((575, 656)):
            box = tuple(round(zoom * at) for at in (x, y, x + 77, y + 77))
            tile = whole.crop(box).resize((136, 136), Image.Resampling.LANCZOS)
            card.paste(tile, (EDGE + 12 + place * 152, 220 + half * 144))


def asked(card: Image.Image) -> None:
    """The dialog that asks."""
    dialog = Image.open(PAGES / "ranker.jpg").convert("RGB")
    dialog.thumbnail((SIDE - 2 * EDGE, SIDE), Image.Resampling.LANCZOS)
    card.paste(dialog, ((SIDE - dialog.width) // 2, 232))


def rated(card: Image.Image) -> None:
    """Four pictures with a number of points each."""
    size = (SIDE - 2 * EDGE) // 4
    for place, points in enumerate((3, 2, 5, 1)):
        card.paste(drawn(place, 0, 0, size - 4), (EDGE + place * size, 254))
        written(card, str(points), 64, "white", EDGE + place * size + size // 2, 384)


def way(card: Image.Image) -> None:
    """What is done, again and again."""
    pen, half = ImageDraw.Draw(card), (SIDE - 2 * EDGE - 56) // 2
    for place, (word, colour) in enumerate(STEPS):
        left, top = EDGE + (place in (1, 2)) * (half + 56), 258 + (place // 2) * 120
        pen.rounded_rectangle((left, top, left + half, top + 96), 18, fill=colour)
        written(card, word, 44, "white", left + half // 2, top + 20)
    for text, x, y in ((">", SIDE // 2, 280), ("<", SIDE // 2, 400)):
        written(card, text, 44, QUIET, x, y)


def written(card: Image.Image, text: str, size: int, colour: str, middle: int, top: int, width: int = SIDE) -> None:
    """A line, centred, smaller where it is too long."""
    while (font := ImageFont.load_default(size=size)).getlength(text) > width:
        size -= 2
    ImageDraw.Draw(card).text((middle, top), text, fill=colour, font=font, anchor="ma")


OWN = "your own checkpoint"
CARDS = {
    "start_here": Card("Start here", "press Run: it learns in two minutes", learned),
    "quickstart": Card("Quickstart", "the whole loop in one node", learned),
    "quickstart_edits": Card("Edits", "a model that edits learns what is asked", edited),
    "visual_loop": Card("Visual loop", "every step is a node of its own", way),
    "human_ranking": Card("You choose", "your ranking is the reward", asked),
    "any_node_as_reward": Card("Any node judges", "numbers of your graph are the reward", way),
    "gallery_preferences": Card("Your pictures", "rated by you; nothing is drawn", rated),
    "apply_lora": Card("Apply a LoRA", "an ordinary graph, before and after", learned),
    "native_sd15": Card("SD 1.5", OWN, way),
    "native_sdxl": Card("SDXL", OWN, way),
    "native_sdxl_vpred": Card("SDXL v-pred", "NoobAI and its like", way),
    "native_sd35": Card("SD 3.5", OWN, way),
    "native_flux": Card("FLUX.1", OWN, way),
    "native_flux2_klein": Card("FLUX.2 klein", OWN, way),
    "native_flux2_klein_edit": Card("FLUX.2 klein", "edits, on a picture of yours", way),
    "native_chroma": Card("Chroma", OWN, way),
    "native_qwenimage": Card("Qwen-Image", OWN, way),
    "native_zimage": Card("Z-Image", OWN, way),
    "native_hidream": Card("HiDream", OWN, way),
    "native_wan": Card("Wan", "films of one frame: pictures", way),
}


def main() -> None:
    for name, (title, line, draw) in CARDS.items():
        card = Image.new("RGB", (SIDE, SIDE), GROUND)
        written(card, title, 80, "white", SIDE // 2, 84, SIDE - 2 * EDGE)
        written(card, line, 32, QUIET, SIDE // 2, 176, SIDE - 2 * EDGE)
        draw(card)
        card.save(WORKFLOWS / f"{name}.jpg", quality=88, optimize=True)


if __name__ == "__main__":
    main()
