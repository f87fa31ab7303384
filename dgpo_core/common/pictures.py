"""Labelled grids of images and the curve of the reward."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dgpo_core.common.group import Group

MARGIN, LINE, GAP = 6, 16, 18  # pixels
LEAST_TILE, MOST_TILE = 96, 512
MOST_POINTS = 2000  # of a curve
TICKS = 5  # of an axis, at most; they take most of the time that a curve takes
MOST_EACH = 4  # images of each group, where groups are compared


def to_pil(image: Tensor) -> Image.Image:
    """float [3, H, W] in [0, 1] to a picture."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def grid(
    groups: Sequence[Group],
    title: str,
    scores: Sequence[Tensor] | None = None,
    advantages: Sequence[Tensor] | None = None,
    most: int = MOST_TILE,
) -> Image.Image:
    """One row per group under its prompt, each image with its score; before them the pictures that they are made of.

    Small images are enlarged, larger ones made smaller until their longer side is `most` pixels.
    advantages: frames the images that the update would favour in green, those it would disfavour in red.
    """
    height, width = groups[0].images.shape[-2:]
    zoom = min(max(1, math.ceil(LEAST_TILE / min(height, width))), most / max(height, width))
    tile_w, tile_h = round(width * zoom), round(height * zoom)
    smooth = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.LANCZOS
    before = max(len(group.prompt.sources) for group in groups)
    columns = before + max(len(group) for group in groups)
    row_h = LINE + tile_h + (LINE if scores else 0) + MARGIN
    sheet = Image.new("RGB", (MARGIN + columns * (tile_w + MARGIN), LINE + 2 * MARGIN + len(groups) * row_h), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    pen.text((MARGIN, MARGIN), title, fill="black", font=font)
    for row, group in enumerate(groups):
        top = LINE + 2 * MARGIN + row * row_h
        pen.text((MARGIN, top), group.prompt.text, fill="black", font=font)
        for place, source in enumerate(group.sources):
            at = MARGIN + place * (tile_w + MARGIN), top + LINE
            sheet.paste(fitted(source, (tile_w, tile_h), smooth), at)
            if scores:
                pen.text((at[0], at[1] + tile_h), "source", fill="dimgray", font=font)
        for column, image in enumerate(group.images):
            left = MARGIN + (before + column) * (tile_w + MARGIN)
            tile = to_pil(image).resize((tile_w, tile_h), smooth)
            sheet.paste(tile, (left, top + LINE))
            if advantages and float(advantages[row][column]):
                color = "forestgreen" if advantages[row][column] > 0 else "crimson"
                box = (left - 2, top + LINE - 2, left + tile_w + 1, top + LINE + tile_h + 1)
                pen.rectangle(box, outline=color, width=2)
            if scores:
                label = f"{float(scores[row][column]):.2f}"
                pen.text((left, top + LINE + tile_h), label, fill="dimgray", font=font)
    return sheet


def comparison(
    columns: Mapping[str, Sequence[Group]], scores: Sequence[Sequence[Tensor]], width: int = 1800
) -> Image.Image:
    """One block of images per column under its title, one row per group: the same prompts and seeds side by side.

    The pictures that they are made of stand before the first block. columns: groups by title, as many in each. scores:
    of each column's groups, [G] each. width: pixels of the blocks, about; as many images of each group are shown as
    fit, at least one and at most `MOST_EACH`.
    """
    first = next(iter(columns.values()))
    height, wide = first[0].images.shape[-2:]
    zoom = (
        max(1, math.ceil(LEAST_TILE / min(height, wide)))
        if max(height, wide) < LEAST_TILE
        else 256 / max(height, wide, 256)
    )
    tile_w, tile_h = round(wide * zoom), round(height * zoom)
    smooth = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.LANCZOS
    fitting = max(1, (width // len(columns) - GAP) // (tile_w + MARGIN))
    count = min(MOST_EACH, fitting, *(len(group) for group in first))
    block = count * (tile_w + MARGIN) + GAP
    shown = max(len(group.prompt.sources) for group in first)
    edge = MARGIN + (shown * (tile_w + MARGIN) + GAP if shown else 0)
    row_h = LINE + tile_h + LINE + MARGIN
    top = 2 * LINE
    sheet = Image.new("RGB", (edge + len(columns) * block, top + len(first) * row_h), "white")
    pen, font, bold = ImageDraw.Draw(sheet), ImageFont.load_default(size=12), ImageFont.load_default(size=15)
    for y, group in enumerate(first):
        for place, source in enumerate(group.sources):
            at = MARGIN + place * (tile_w + MARGIN), top + y * row_h + LINE
            sheet.paste(fitted(source, (tile_w, tile_h), smooth), at)
            pen.text((at[0], at[1] + tile_h), "source", fill="dimgray", font=font)
    for x, (title, groups) in enumerate(columns.items()):
        left = edge + x * block
        pen.text((left, MARGIN), _shortened(title, bold, block - GAP), fill="black", font=bold)
        for y, group in enumerate(groups):
            if x == 0:
                text = _shortened(group.prompt.text, font, sheet.width - 2 * MARGIN)
                pen.text((MARGIN, top + y * row_h), text, fill="black", font=font)
            for i in range(count):
                at = left + i * (tile_w + MARGIN), top + y * row_h + LINE
                sheet.paste(to_pil(group.images[i]).resize((tile_w, tile_h), smooth), at)
                pen.text((at[0], at[1] + tile_h), f"{float(scores[x][y][i]):.2f}", fill="dimgray", font=font)
    return sheet


def fitted(picture: Tensor, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """A picture [3, h, w] of any size, scaled into (width, height), on white where its proportions are others."""
    inside = to_pil(picture)
    zoom = min(size[0] / inside.width, size[1] / inside.height)
    scaled = inside.resize((max(1, round(inside.width * zoom)), max(1, round(inside.height * zoom))), resample)
    tile = Image.new("RGB", size, "white")
    tile.paste(scaled, ((size[0] - scaled.width) // 2, (size[1] - scaled.height) // 2))
    return tile


def _shortened(text: str, font: Any, width: int) -> str:
    """The text, or as much of it as is `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def reward_curve(records: Sequence[Mapping[str, Any]], name: str) -> Image.Image:
    """A picture of what is trained, the reward `name`, and beside it of all that is watched, over the iterations.

    records: those of metrics.jsonl; ones with "reward" are iterations, ones with "held_out" evaluations. Bars are 95 %
    intervals, dashes the value before the training; what an alarm is about is red.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    looks = [r for r in records if r.get("in_domain")]
    watched = [key for key in (looks[-1] if looks else {}) if key.startswith("watch/")]
    columns = math.ceil(len(watched) / 2)
    inches = 6.4 + 2.6 * columns
    figure = Figure(figsize=(inches, 4.2), dpi=110)  # placed by hand: "constrained" takes longer than all the rest
    place = {"left": 0.65 / inches, "right": 1 - 0.15 / inches, "bottom": 0.12, "top": 0.92}
    panels = figure.add_gridspec(2, 1 + columns, width_ratios=[2.2, *[1] * columns], **place, wspace=0.3, hspace=0.4)
    axes = figure.add_subplot(panels[:, 0])
    trained = thinned([(r["iteration"], r["reward"]) for r in records if r.get("reward") is not None])
    if trained:
        axes.plot(*zip(*trained, strict=True), color="tab:blue", alpha=0.8, label="while training")
    if looks:
        _errorbars(axes, looks, "in_domain", "tab:orange", label="held-out prompts")
    axes.set_title(f"trained: {name}" if name else "trained", fontsize=11)
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(TICKS, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(TICKS))
    axes.grid(alpha=0.3)
    if trained or looks:
        axes.legend(loc="lower right", fontsize=9)
    raised = {key for r in looks for key in r.get("alarms", ())}
    for i, key in enumerate(watched):
        short = key.removeprefix("watch/")
        color, mark = ("crimson", " (alarm)") if short in raised else ("tab:green", "")
        small = figure.add_subplot(panels[i % 2, 1 + i // 2])
        before = looks[0].get(key, {}).get("mean")
        if before is not None:
            small.axhline(before, color="gray", linestyle="--", linewidth=0.8)
        _errorbars(small, looks, key, color)
        small.set_title(f"watched: {short}{mark}", fontsize=9, color=color if mark else "black")
        small.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        small.tick_params(labelsize=8)
        small.grid(alpha=0.3)
    return drawn(figure)


def drawn(figure: Any) -> Image.Image:
    """A matplotlib Figure as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` of them: means of as many neighbours each as that takes. No screen shows more."""
    size = max(1, math.ceil(len(points) / MOST_POINTS))
    if size == 1:
        return list(points)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _errorbars(axes: Any, looks: Sequence[Mapping[str, Any]], key: str, color: str, **options: Any) -> None:
    """Means with their 95 % intervals; what was no finite number, null in a record, is left out."""
    known = [(r["iteration"], r[key]) for r in looks if r.get(key) and r[key]["mean"] is not None]
    points = [(iteration, row["mean"], 1.96 * (row["sem"] or 0.0)) for iteration, row in known]
    if points:
        axes.errorbar(*zip(*points, strict=True), color=color, marker="o", markersize=4, capsize=3, **options)
