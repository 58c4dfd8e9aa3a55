"""Resizing and cropping of uint8 (H, W, 3) images, in planes of grey levels, as TensorFlow does them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def check_image(image: np.ndarray) -> None:
    """ValueError for anything but uint8 (H, W, 3)."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image is {found}, expected uint8 (H, W, 3)")


def resize_lanczos3(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (h, w, 3) with an antialiased Lanczos kernel of radius 3, rounded and clipped."""
    check_image(image)
    if image.shape[:2] == tuple(size):
        return image
    return join_channels(resized_planes(image, size, block=max(size)), np.empty((*size, 3), np.uint8))


def resized_planes(image: np.ndarray, size: tuple[int, int], block: int) -> np.ndarray:
    """uint8 (H, W, 3) -> whole grey levels as float32 planes (3, h, w), `block` output rows or columns at a time.

    Short blocks multiply by few of the zeros off the diagonal of the resampling matrices, long ones take less time per
    number: of 8, 16, 32 and 56, 16 was the fastest for 256 -> 224. The order of the additions depends on the block,
    and with it the rounding of a few values in a million. Evaluation multiplies the whole matrices.
    """
    height, width = image.shape[:2]
    planes = split_channels(image)
    if (height, width) == tuple(size):
        return planes
    rows = np.empty((3, size[0], width), np.float32)
    for outputs, inputs, weights in _lanczos3_bands(height, size[0], block):
        np.matmul(weights, planes[:, inputs], out=rows[:, outputs])
    resized = np.empty((3, *size), np.float32)
    for outputs, inputs, weights in _lanczos3_bands(width, size[1], block):
        np.matmul(rows[:, :, inputs], weights.T, out=resized[:, :, outputs])
    return np.clip(np.rint(resized, out=resized), 0, 255, out=resized)


@lru_cache(maxsize=16)
def _lanczos3_bands(in_size: int, out_size: int, block: int) -> list[tuple[slice, slice, np.ndarray]]:
    """Blocks (outputs, inputs, weights (b, i) float32) of the resampling matrix.

    Its rows have unit sums; the kernel widens when shrinking (antialias).
    """
    step = in_size / out_size
    centers = (np.arange(out_size) + 0.5) * step
    distance = np.abs(np.arange(in_size) + 0.5 - centers[:, None]) / max(step, 1.0)
    weights = np.where(distance < 3.0, np.sinc(distance) * np.sinc(distance / 3.0), 0.0)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    bands = []
    for start in range(0, out_size, block):
        rows = weights[start : start + block]
        used = np.flatnonzero(rows.any(axis=0))
        inputs = slice(int(used[0]), int(used[-1]) + 1)
        bands.append((slice(start, start + len(rows)), inputs, np.ascontiguousarray(rows[:, inputs])))
    return bands


def crop_and_resize(planes: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """Bilinear crops with aligned corners: the box corners are sampled by the corner pixels of the output.

    planes (n, C, H, W) uint8 or float32; boxes (n, 4) as y0, x0, y1, x1 in [0, 1], where 1 is the last pixel centre;
    returns (n, C, size, size) float32 in the range of the input.
    """
    count, channels = planes.shape[:2]
    cropped = np.empty((count, channels, size, size), dtype=np.float32)
    for plane, box, out in zip(planes, boxes, cropped, strict=True):
        out[:] = crop_transposed(plane.astype(np.float32, copy=False), box, size).transpose(0, 2, 1)
    return cropped


def crop_transposed(planes: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """float32 (C, H, W) -> float32 crop (C, size, size) with x before y: whole rows copy faster than columns."""
    rows = _blend_rows(planes, box[0], box[2], size)
    return _blend_rows(np.ascontiguousarray(rows.transpose(0, 2, 1)), box[1], box[3], size)


def _blend_rows(planes: np.ndarray, start: float, stop: float, size: int) -> np.ndarray:
    """float32 (C, H, W) -> (C, size, W): rows at equal distances from `start` to `stop`, 1 is the last row."""
    last = planes.shape[1] - 1
    position = np.linspace(start * last, stop * last, size)
    index = np.clip(position.astype(np.intp), 0, last)
    fraction = (position - index).astype(np.float32)[:, None]
    low = planes.take(index, axis=1)  # faster than planes[:, index]
    blended = planes.take(np.minimum(index + 1, last), axis=1)
    blended -= low
    blended *= fraction
    blended += low
    return blended


def center_crop(image: np.ndarray, area: float) -> np.ndarray:
    """uint8 (S, S, 3) -> central crop of `area` of the image, resized back to (S, S, 3) uint8."""
    check_image(image)
    if image.shape[0] != image.shape[1]:
        raise ValueError(f"image has shape {image.shape}, expected a square one")
    margin = (1.0 - np.sqrt(area)) / 2.0
    box = np.array([[margin, margin, 1.0 - margin, 1.0 - margin]])
    planes = split_channels(image) / np.float32(255.0)
    scaled = crop_and_resize(planes[None], box, image.shape[0])[0]
    scaled *= np.float32(255.5)  # uint8 level of v: trunc(255.5 v), TensorFlow's conversion
    return join_channels(np.minimum(scaled, np.float32(255.0), out=scaled), np.empty_like(image))


def split_channels(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (3, H, W)."""
    planes = np.empty((3, *image.shape[:2]), np.float32)
    for channel, plane in enumerate(planes):  # numpy would loop over the channels inside, three times slower
        plane[:] = image[:, :, channel]
    return planes


def join_channels(planes: np.ndarray, image: np.ndarray) -> np.ndarray:
    """(3, H, W) in (-1, 256), truncated, into `image`, uint8 (H, W, 3); returns `image`."""
    for channel, plane in enumerate(planes.astype(np.uint8)):
        image[:, :, channel] = plane
    return image
