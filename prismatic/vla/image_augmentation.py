"""Random augmentation of training images: crop, brightness, contrast, saturation and hue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prismatic.vla.image_resampling import crop_transposed, join_channels, split_channels

_BLOCK = 12544  # pixels: a quarter of a 224 px image, whose intermediate results stay in the second-level cache
_TRUNCATED = 255.5 / 255.0  # grey levels times this, truncated, are TensorFlow's uint8 levels


@dataclass(frozen=True)
class AugmentSettings:
    """Ranges of the random augmentation; the defaults are those of the published training.

    crop_area: kept area fraction. brightness, hue: additive, drawn from +-value. contrast, saturation: factor ranges.
    """

    crop_area: float = 0.9
    brightness: float = 0.2
    contrast: tuple[float, float] = (0.8, 1.2)
    saturation: tuple[float, float] = (0.8, 1.2)
    hue: float = 0.05


def augment_images(images: np.ndarray, rng: np.random.Generator, settings: AugmentSettings) -> np.ndarray:
    """Random crop, brightness, contrast, saturation and hue, in this order; own draws per image.

    images (n, S, S, 3) uint8 -> same shape uint8. Six uniform numbers per image are taken from `rng`. Values are
    clipped to [0, 1] after each operation.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ValueError(f"images have shape {images.shape} {images.dtype}, expected (n, S, S, 3) uint8")
    augmented = np.empty_like(images)
    for image, draw, out in zip(images, draw_numbers(len(images), rng), augmented, strict=True):
        augment_planes(split_channels(image), draw, settings, out)
    return augmented


def draw_numbers(count: int, rng: np.random.Generator) -> np.ndarray:
    """Six uniform numbers for each image."""
    return rng.random((count, 6), dtype=np.float64)


def augment_planes(planes: np.ndarray, draw: np.ndarray, settings: AugmentSettings, out: np.ndarray) -> None:
    """Grey levels float32 (3, S, S) and their six draws -> out uint8 (S, S, 3)."""
    size, side = planes.shape[1], np.sqrt(settings.crop_area)
    corner = draw[:2] * (1.0 - side)
    pixels = crop_transposed(planes, np.concatenate([corner, corner + side]), size).reshape(3, -1)
    brightness = _between(draw[2], -settings.brightness, settings.brightness)
    _shift_brightness_contrast(pixels, brightness, _between(draw[3], *settings.contrast))
    saturation, hue = _between(draw[4], *settings.saturation), _between(draw[5], -settings.hue, settings.hue)
    levels = _shift_saturation_hue(pixels, saturation, hue).reshape(3, size, size)
    join_channels(levels.transpose(0, 2, 1), out)


def _between(draw: float, low: float, high: float) -> float:
    return float(low + draw * (high - low))


def _shift_brightness_contrast(pixels: np.ndarray, brightness: float, contrast: float) -> None:
    """Grey levels float32 (3, N), in place: offset (share of 255), then factor about the channel means."""
    pixels += np.float32(255.0 * brightness)
    np.clip(pixels, 0.0, 255.0, out=pixels)
    mean = pixels.mean(axis=1, keepdims=True)
    pixels *= np.float32(contrast)
    pixels += mean * np.float32(1.0 - contrast)
    np.clip(pixels, 0.0, 255.0, out=pixels)


def _shift_saturation_hue(pixels: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """HSV saturation scaling (clipped at 1) and hue shift (in turns): grey levels float32 (3, N) -> uint8 (3, N).

    Levels become whole numbers as TensorFlow's: trunc(255.5 v) of the value v in [0, 1].
    """
    sectors = 6.0 * hue
    turns = round(sectors / 2.0)  # two sectors are one channel: at most one sector is left for the blocks
    pixels = np.roll(pixels, turns, axis=0) if turns else pixels
    levels = np.empty(pixels.shape, np.uint8)
    for start in range(0, pixels.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        levels[:, block] = _shift_block(pixels[:, block], saturation, sectors - 2.0 * turns)
    return levels


def _shift_block(rgb: np.ndarray, saturation: float, sectors: float) -> np.ndarray:
    """Grey levels float32 (3, n) -> 255.5 / 255 times the shifted levels, float32 (3, n); |sectors| <= 1.

    With V the largest, L the smallest and M the middle value and chroma C = V - L, channel c is
    L + clip(2 c - L - M, 0, C) for every colour: the largest exceeds its bound by V - M, the smallest by M - L. These
    are the distances along the HSV hexagon to where the channel starts to change, so a hue shift by s sectors adds
    -s C or s C, depending on which of the other two channels is larger. The saturation scales C and keeps V. The code
    halves the expression inside the clip and its bounds, which saves doubling c.
    """
    red, green, blue = rgb
    value = np.maximum(red, green)
    lowest = np.minimum(red, green)
    np.maximum(value, blue, out=value)
    np.minimum(lowest, blue, out=lowest)
    chroma = value - lowest
    middle = red + green
    middle += blue
    middle -= value
    middle *= np.float32(0.5)  # (L + M) / 2
    shift = np.empty_like(rgb)
    for channel in range(3):
        np.subtract(rgb[(channel + 1) % 3], rgb[(channel + 2) % 3], out=shift[channel])
    # The sign bit of the difference decides between s C / 2 and -s C / 2. Where it is 0, the channel is the largest or
    # the smallest and exceeds its bound by C, so that the clip gives this bound for either sign.
    chroma *= np.float32(0.5)
    amount = chroma * np.float32(sectors)
    bits = shift.view(np.uint32)
    bits &= np.uint32(1 << 31)
    bits ^= amount.view(np.uint32)
    shifted = rgb - middle
    shifted -= shift
    np.clip(shifted, 0.0, 255.0, out=shifted)  # 255 is no bound; np.maximum with a number is slower
    scale = np.float32(2.0 * saturation * _TRUNCATED)
    if saturation > 1.0:
        limit = value * np.float32(_TRUNCATED)  # saturation 1 at most
        limit /= chroma + np.float32(1e-6)
        scale = np.clip(limit, 0.0, scale, out=limit)
    np.minimum(shifted, chroma, out=shifted)
    value *= np.float32(_TRUNCATED)
    chroma *= scale
    value -= chroma
    shifted *= scale
    shifted += value
    return shifted
