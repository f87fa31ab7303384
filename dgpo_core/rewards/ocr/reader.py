"""Reading a picture: RapidOCR finds the lines, and here they are put in the order in which people read."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

WITHIN = 0.5
"""Boxes of which the smaller overlaps the larger by more than this share of its height are in one row."""


class Reader:
    """RapidOCR with the models in its wheel.

    characters: all that it can read. Source: https://github.com/RapidAI/RapidOCR.
    """

    def __init__(self, threads: int) -> None:
        from rapidocr import RapidOCR

        params: dict[str, Any] = {"Global.log_level": "error"}
        if threads:
            params["EngineConfig.onnxruntime.intra_op_num_threads"] = threads
        self.engine = RapidOCR(params=params)
        logging.getLogger("RapidOCR").setLevel(logging.ERROR)  # it warns of every picture without text
        blank = np.full((48, 160, 3), 255, dtype=np.uint8)
        self.engine(blank, use_det=False, use_cls=False)  # newer versions load their models when they are first used
        self.characters = frozenset(self.engine.text_rec.postprocess_op.character)

    def __call__(self, picture: np.ndarray) -> tuple[str, ...]:
        """All the text in a picture, uint8 [H, W, 3] RGB, in each order in which it may be read."""
        # it expects OpenCV's BGR, and remembers what it was last told to use
        found = self.engine(picture[:, :, ::-1].copy(), use_det=True, use_cls=False)
        return readings(found.txts, found.boxes) if found.txts else ("",)


def readings(lines: Sequence[str], boxes: np.ndarray) -> tuple[str, ...]:
    """The lines row by row, and column by column, as two signs beside each other are read.

    boxes: float [n, 4, 2], of each line the corners from its top left on, clockwise.
    """
    left, top, right, bottom = _upright(np.asarray(boxes, dtype=float)).T
    rows = [sorted(row, key=lambda i: left[i]) for row in _bands(top, bottom)]
    columns = [sorted(column, key=lambda i: top[i]) for column in _bands(left, right)]
    return tuple(" ".join(lines[i] for band in bands for i in band) for bands in (rows, columns))


def _upright(boxes: np.ndarray) -> np.ndarray:
    """Left, top, right and bottom, [n, 4], after the whole is turned so that the lines run level."""
    x, y = (boxes[:, 1] - boxes[:, 0]).sum(axis=0)
    angle = np.arctan2(y, x)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turned = boxes @ turn
    return np.concatenate([turned.min(axis=1), turned.max(axis=1)], axis=1)


def _bands(low: np.ndarray, high: np.ndarray) -> list[list[int]]:
    """The numbers of the ranges, from low to high, in groups: each overlaps with the one before it in its group."""
    bands: list[list[int]] = []
    for i in np.argsort(low + high, kind="stable").tolist():
        last = bands[-1][-1] if bands else i
        overlap = min(high[i], high[last]) - max(low[i], low[last])
        if bands and overlap > WITHIN * min(high[i] - low[i], high[last] - low[last]):
            bands[-1].append(i)
        else:
            bands.append([i])
    return bands
