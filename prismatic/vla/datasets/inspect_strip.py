"""Frame strips: what each camera saw, for the human eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from prismatic.evidence.files import replacing
from prismatic.vla.datasets.inspect_measures import read_pixels
from prismatic.vla.datasets.source import EpisodeSource

_TILE = 144
_LABEL = 14
_MARGIN = 4
_BACKGROUND, _INK, _MISSING = (255, 255, 255), (0, 0, 0), (200, 0, 0)


def draw_strip(source: EpisodeSource, camera: str, path: Path, episodes: int = 3, frames: int = 8) -> Path:
    """Write a PNG with one row per episode: instruction above, frames with their step below; returns the path.

    The episodes are spread evenly over the data set, the frames over the episode. Every frame keeps its proportions.
    A frame that cannot be decoded is a red square.
    """
    chosen = _spread(len(source), episodes)
    row_height = 2 * _LABEL + _TILE + 2 * _MARGIN
    canvas = Image.new("RGB", (frames * (_TILE + _MARGIN) + _MARGIN, row_height * max(1, len(chosen))), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for row, episode in enumerate(chosen):
        top = row * row_height + _MARGIN
        title = f"{camera}, episode {episode}: {source.instructions[episode]}"
        draw.text((_MARGIN, top), _ascii(title), fill=_INK)
        for column, step in enumerate(_spread(int(source.lengths[episode]), frames)):
            left = _MARGIN + column * (_TILE + _MARGIN)
            canvas.paste(_tile(source, camera, episode, step), (left, top + _LABEL))
            draw.text((left, top + _LABEL + _TILE), f"step {step}", fill=_INK)
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG")
    return path


def _spread(total: int, count: int) -> list[int]:
    return sorted({int(place) for place in np.linspace(0, total - 1, min(total, count)).round()}) if total else []


def _tile(source: EpisodeSource, camera: str, episode: int, step: int) -> Image.Image:
    tile = Image.new("RGB", (_TILE, _TILE), _BACKGROUND)
    try:
        image = Image.fromarray(read_pixels(source, camera, episode, step))
    except ValueError:
        tile.paste(_MISSING, (0, 0, _TILE, _TILE))
        return tile
    scale = _TILE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    tile.paste(image.resize((width, height), Image.Resampling.BICUBIC), (0, 0))
    return tile


def _ascii(text: str) -> str:
    # Pillow's built-in font has no other letters and would raise without FreeType.
    return text.encode("ascii", "replace").decode()
