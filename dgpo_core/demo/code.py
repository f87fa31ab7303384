"""What the embedded VAE's latents hold: for each cell of 8 x 8 pixels, which colour and shape cover it, and where.

A VAE that is free to choose finds a code that a small diffusion model learns too slowly. This one is told what to
choose, so that "red" and "circle" in a prompt are channels, and "left of" is a place.
"""

import numpy as np

from dgpo_core.demo.world import BACKGROUND, COLOURS, SHAPES, SIZE, Drawing

CELL = 8  # pixels
CELLS = SIZE // CELL
COVERAGE_SCALE = 3.0  # latent of a wholly covered cell
MOMENT_SCALE = 6.0  # a half covered cell has a first moment of a quarter
GREY_SCALE = 0.1

_ALONG = ((np.arange(SIZE) % CELL + 0.5) * 2 / CELL - 1).astype(np.float32)  # from -1 to 1 across a cell
_X, _Y = np.broadcast_to(_ALONG, (SIZE, SIZE)), np.broadcast_to(_ALONG[:, None], (SIZE, SIZE))


def code(drawing: Drawing) -> np.ndarray:
    """The latent of a picture, as the diffusion model sees it: float32 [16, 8, 8].

    Channels: coverage by each of 5 colours, by each of 3 shapes, and in all; first and second moments of the coverage
    within the cell (x, y, xx, yy, xy); where the objects' centres are; the ground's grey.
    """
    latent = np.zeros((16, CELLS, CELLS), dtype=np.float32)
    colors, shapes = list(COLOURS), list(SHAPES)
    for thing, mask in zip(drawing.objects, drawing.masks, strict=True):
        covered = COVERAGE_SCALE * _pool(mask)
        for channel in (colors.index(thing.color), 5 + shapes.index(thing.shape), 8):
            latent[channel] += covered
        weights = (_X, _Y, _X * _X - 1 / 3, _Y * _Y - 1 / 3, _X * _Y)  # zero on average over a cell
        for channel, weight in enumerate(weights, start=9):
            latent[channel] += MOMENT_SCALE * _pool(mask * weight)
        latent[14] += COVERAGE_SCALE * _splat(thing.x / CELL - 0.5, thing.y / CELL - 0.5)
    latent[15] = GREY_SCALE * (drawing.grey - sum(BACKGROUND) / 2)
    return latent


def _pool(values: np.ndarray) -> np.ndarray:
    """Means over cells, [64, 64] -> [8, 8]."""
    return values.reshape(CELLS, CELL, CELLS, CELL).mean(axis=(1, 3))


def _splat(x: float, y: float) -> np.ndarray:
    """One unit spread over the four cells around a point, in cells."""
    near = np.arange(CELLS, dtype=np.float32)
    return np.outer(np.clip(1 - abs(near - y), 0, None), np.clip(1 - abs(near - x), 0, None))
