"""The first batch of a run as the policy sees it, for the human eye: a picture and a text beside `metrics.jsonl`.

Images are taken back from the numbers that go into the vision towers, so that crops, colours, grey images and the order
of the cameras are those of the training; actions and state are the normalised ones.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from prismatic.evidence.cells import one_line
from prismatic.evidence.files import replacing, write_text
from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor

PICTURE, TEXT = "first_batch.png", "first_batch.txt"
_SAMPLES = 16
"""Most samples that are drawn."""
_TILE, _LINE, _MARGIN = 224, 14, 6
_LETTER = 6.5
"""Pixels of a letter of Pillow's built-in font, as wide as they get."""


def write_first_batch(
    folder: Path, batch: dict[str, Any], processor: PrismaticImageProcessor, cameras: Sequence[str] = ()
) -> None:
    """Write `first_batch.png` and `first_batch.txt` into the folder of a run.

    Args:
        folder: of the run.
        batch: a micro-batch of `VLACollator`, on any device.
        processor: made its images.
        cameras: their names, for the captions.

    Raises OSError when they cannot be written.
    """
    images = pixels_of(batch["pixel_values"][:_SAMPLES], processor)
    with replacing(folder / PICTURE) as temporary:
        _sheet(images, batch["instructions"], cameras).save(temporary, format="PNG")
    write_text(folder / TEXT, "\n".join(_description(batch, cameras)) + "\n")


def pixels_of(values: Tensor, processor: PrismaticImageProcessor) -> np.ndarray:
    """(B, 3*towers*n, H, W) as the policy takes them -> uint8 (B, n, H, W, 3), as the first tower sees them."""
    towers = len(processor.means)
    mean, std = (torch.tensor(each[0]).reshape(3, 1, 1) for each in (processor.means, processor.stds))
    shown = values.detach().float().cpu().unflatten(1, (-1, towers, 3))[:, :, 0] * std + mean
    images: np.ndarray = (255 * shown).round().clamp(0, 255).to(torch.uint8).movedim(2, -1).numpy()
    return images


def _sheet(images: np.ndarray, instructions: Sequence[str], cameras: Sequence[str]) -> Image.Image:
    """A row per sample: its instruction above, an image per camera."""
    count, views, height, width = images.shape[:4]
    side = max(_TILE, height, width)
    across = views * (side + _MARGIN) + _MARGIN
    captions = [_caption(number, text, across) for number, text in enumerate(instructions[:count])]
    heights = [_LINE * len(lines) + side + 2 * _MARGIN for lines in captions]
    sheet = Image.new("RGB", (across, _LINE + sum(heights)), (255, 255, 255))
    draw, top = ImageDraw.Draw(sheet), _LINE
    for view, name in enumerate(cameras[:views]):
        draw.text((_MARGIN + view * (side + _MARGIN), 0), _ascii(name), fill=(0, 0, 0))
    for row, lines in enumerate(captions):
        for number, line in enumerate(lines):
            draw.text((_MARGIN, top + number * _LINE), line, fill=(0, 0, 0))
        for view in range(views):
            # Without smoothing: each pixel that the policy gets is seen.
            tile = Image.fromarray(images[row, view]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (_MARGIN + view * (side + _MARGIN), top + len(lines) * _LINE + _MARGIN // 2))
        top += heights[row]
    return sheet


def _caption(number: int, text: str, across: int) -> list[str]:
    return textwrap.wrap(_ascii(f"{number}: {text}"), max(10, int((across - 2 * _MARGIN) / _LETTER)))[:4]


def _ascii(text: str) -> str:
    # Pillow's built-in font has no other letters and would raise without FreeType.
    return one_line(text).encode("ascii", "replace").decode()


def _description(batch: dict[str, Any], cameras: Sequence[str]) -> list[str]:
    shape = tuple(batch["pixel_values"].shape)
    lines = [
        "The first micro-batch of the main process, as the policy sees it. Actions and state are normalised.",
        f"images: {shape[0]} samples, cameras {', '.join(map(one_line, cameras)) or 'without names'}, "
        f"{shape[-2]} x {shape[-1]} pixels; {PICTURE} shows the first {min(shape[0], _SAMPLES)}",
        *(line for name in ("actions", "proprio") if name in batch for line in _ranges(name, batch[name])),
        "",
    ]
    replay = batch.get("is_replay", [False] * shape[0])
    rows = zip(batch["instructions"], batch["dataset_names"], batch["sample_ids"], replay, strict=True)
    for number, (text, data_set, (episode, step), is_replay) in enumerate(rows):
        old = ", replayed" if is_replay else ""
        lines.append(f"{number}: {one_line(text)}  [{one_line(data_set)}, episode {episode}, step {step}{old}]")
    return lines


def _ranges(name: str, values: Tensor) -> list[str]:
    """A line per dimension: least, mean and greatest value over samples and steps."""
    table = values.detach().float().cpu().flatten(0, -2)
    least, greatest, mean = table.amin(0).tolist(), table.amax(0).tolist(), table.mean(0).tolist()
    lines = [f"{name}: {table.shape[1]} dimensions of {len(table)} rows (least, mean, greatest)"]
    numbers = zip(least, mean, greatest, strict=True)
    return lines + [f"  {n}: {low:+.4f} {middle:+.4f} {high:+.4f}" for n, (low, middle, high) in enumerate(numbers)]
