"""Image preprocessing shared by training and evaluation, in numpy and Pillow.

Images are uint8 (H, W, 3) RGB. Resize and crop follow TensorFlow's `resize(lanczos3, antialias)` and
`crop_and_resize`, which published policies were trained with.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

# Every pixel of an image that shows nothing (`blind_images`). JPEG, resize and crop leave this level as it is.
GREY_LEVEL = 128
# Of one image: 100 MB of pixels. A small file can declare any size.
MAX_PIXELS = 1 << 25


@dataclass(frozen=True)
class ImageSpec:
    """What happens to a camera frame before the image processor; saved with every checkpoint.

    size: side of the square model input, pixels. jpeg_quality: quality of the JPEG round trip of simulator frames
    (training frames are JPEG on disk), None = no round trip. center_crop: evaluation uses the central `crop_area`
    fraction of the area, which matches training with random crops of that area.
    """

    size: int = 224
    jpeg_quality: int | None = 95
    center_crop: bool = True
    crop_area: float = 0.9

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"ImageSpec.size is {self.size}, expected a positive integer")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"ImageSpec.jpeg_quality is {self.jpeg_quality}, expected 1..100 or None")
        if not 0.0 < self.crop_area <= 1.0:
            raise ValueError(f"ImageSpec.crop_area is {self.crop_area}, expected 0 < area <= 1")

    def to_dict(self) -> dict:
        """JSON-ready fields; `from_dict` restores an equal object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> ImageSpec:
        """Inverse of `to_dict`; ValueError for missing or unknown fields."""
        expected = set(cls.__dataclass_fields__)
        if set(fields) != expected:
            raise ValueError(f"ImageSpec has fields {sorted(fields)}, expected {sorted(expected)}")
        return cls(**fields)


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


def decode_jpeg(data: bytes) -> np.ndarray:
    """JPEG bytes -> uint8 (H, W, 3), accurate DCT. Raises ValueError for anything that is not an RGB JPEG."""
    return _decode(data, ("JPEG",))


def decode_image(data: bytes) -> np.ndarray:
    """JPEG or PNG bytes -> uint8 (H, W, 3). Raises ValueError for anything that is not an RGB image of these kinds."""
    return _decode(data, ("JPEG", "PNG"))


def image_size(data: bytes) -> tuple[int, int]:
    """(H, W) of JPEG or PNG bytes by their header. ValueError as `decode_image`, but for most damage behind the header.

    PNG checksums are checked, and a JPEG without an end mark is decoded.
    """
    with _opened(data, ("JPEG", "PNG")) as image:
        if image.format == "PNG":
            image.verify()
    if image.format == "JPEG" and b"\xff\xd9" not in data[-64:]:
        decode_image(data)
    return image.height, image.width


def _decode(data: bytes, formats: tuple[str, ...]) -> np.ndarray:
    with _opened(data, formats) as image:
        return np.asarray(image)


@contextmanager
def _opened(data: bytes, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """The image with its header read, RGB and of a size that can be decoded."""
    kind = " or ".join(formats)
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.mode != "RGB":
                found = f"{(image.height, image.width)} and mode {image.mode}"
                raise _NoImageError(f"{kind} image has shape {found}, expected (H, W, 3) RGB")
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width}x{image.height}"
                raise _NoImageError(f"{kind} image of {size} pixels, expected at most {MAX_PIXELS} in all")
            yield image
    except _NoImageError:
        raise
    # Pillow's PNG reader raises SyntaxError, of struct.error and zlib.error many a damaged chunk.
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(f"not a complete {kind} image ({len(data)} bytes): {error}") from error


class _NoImageError(ValueError):
    """An image that is whole and cannot be used."""


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """uint8 (H, W, 3) -> JPEG bytes with 4:2:0 chroma."""
    _check_image(image)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality, subsampling=2)
    return buffer.getvalue()


def resize_lanczos3(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (h, w, 3) with an antialiased Lanczos kernel of radius 3, rounded and clipped."""
    _check_image(image)
    if image.shape[:2] == tuple(size):
        return image
    return _join_channels(_resized_planes(image, size, block=max(size)), np.empty((*size, 3), np.uint8))


def _resized_planes(image: np.ndarray, size: tuple[int, int], block: int) -> np.ndarray:
    """uint8 (H, W, 3) -> whole grey levels as float32 planes (3, h, w), `block` output rows or columns at a time.

    Short blocks multiply by few of the zeros off the diagonal of the resampling matrices, long ones take less time per
    number: of 8, 16, 32 and 56, 16 was the fastest for 256 -> 224. The order of the additions depends on the block,
    and with it the rounding of a few values in a million. Evaluation multiplies the whole matrices.
    """
    height, width = image.shape[:2]
    planes = _split_channels(image)
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
        out[:] = _crop_transposed(plane.astype(np.float32, copy=False), box, size).transpose(0, 2, 1)
    return cropped


def _crop_transposed(planes: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
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
    _check_image(image)
    if image.shape[0] != image.shape[1]:
        raise ValueError(f"image has shape {image.shape}, expected a square one")
    margin = (1.0 - np.sqrt(area)) / 2.0
    box = np.array([[margin, margin, 1.0 - margin, 1.0 - margin]])
    planes = _split_channels(image) / np.float32(255.0)
    scaled = crop_and_resize(planes[None], box, image.shape[0])[0]
    scaled *= np.float32(255.5)  # uint8 level of v: trunc(255.5 v), TensorFlow's conversion
    return _join_channels(np.minimum(scaled, np.float32(255.0), out=scaled), np.empty_like(image))


def augment_images(images: np.ndarray, rng: np.random.Generator, settings: AugmentSettings) -> np.ndarray:
    """Random crop, brightness, contrast, saturation and hue, in this order; own draws per image.

    images (n, S, S, 3) uint8 -> same shape uint8. Six uniform numbers per image are taken from `rng`. Values are
    clipped to [0, 1] after each operation.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ValueError(f"images have shape {images.shape} {images.dtype}, expected (n, S, S, 3) uint8")
    augmented = np.empty_like(images)
    for image, draw, out in zip(images, _draws(len(images), rng), augmented, strict=True):
        _augment(_split_channels(image), draw, settings, out)
    return augmented


def _draws(count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.random((count, 6), dtype=np.float64)


def _augment(planes: np.ndarray, draw: np.ndarray, settings: AugmentSettings, out: np.ndarray) -> None:
    """Grey levels float32 (3, S, S) and their six draws -> out uint8 (S, S, 3)."""
    size, side = planes.shape[1], np.sqrt(settings.crop_area)
    corner = draw[:2] * (1.0 - side)
    pixels = _crop_transposed(planes, np.concatenate([corner, corner + side]), size).reshape(3, -1)
    brightness = _between(draw[2], -settings.brightness, settings.brightness)
    _shift_brightness_contrast(pixels, brightness, _between(draw[3], *settings.contrast))
    saturation, hue = _between(draw[4], *settings.saturation), _between(draw[5], -settings.hue, settings.hue)
    levels = _shift_saturation_hue(pixels, saturation, hue).reshape(3, size, size)
    _join_channels(levels.transpose(0, 2, 1), out)


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


_BLOCK = 12544  # pixels: a quarter of a 224 px image, whose intermediate results stay in the second-level cache
_TRUNCATED = 255.5 / 255.0  # grey levels times this, truncated, are TensorFlow's uint8 levels


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


def _split_channels(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (3, H, W)."""
    planes = np.empty((3, *image.shape[:2]), np.float32)
    for channel, plane in enumerate(planes):  # numpy would loop over the channels inside, three times slower
        plane[:] = image[:, :, channel]
    return planes


def _join_channels(planes: np.ndarray, image: np.ndarray) -> np.ndarray:
    """(3, H, W) in (-1, 256), truncated, into `image`, uint8 (H, W, 3); returns `image`."""
    for channel, plane in enumerate(planes.astype(np.uint8)):
        image[:, :, channel] = plane
    return image


def frame_pixels(frame: bytes | np.ndarray) -> np.ndarray:
    """Stored frame (JPEG or PNG bytes, or uint8 (H, W, 3)) -> uint8 (H, W, 3). ValueError for anything else."""
    if isinstance(frame, bytes):
        return decode_image(frame)
    _check_image(frame)
    return frame


def prepare_train_image(frame: bytes | np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Stored frame (see `frame_pixels`) -> uint8 (size, size, 3). Crops belong to augmentation."""
    return prepare_train_images([frame], spec)[0]


def prepare_train_images(
    frames: Sequence[bytes | np.ndarray],
    spec: ImageSpec,
    augment: AugmentSettings | None = None,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Stored frames of any sizes -> uint8 (n, size, size, 3), augmented with `rng` when `augment` is given.

    The same as `prepare_train_image` and `augment_images` one after another, without the uint8 images in between. One
    image is finished before the next one starts, so that the intermediate results are few and stay in the cache.
    """
    size = (spec.size, spec.size)
    draws = [None] * len(frames) if augment is None else _draws(len(frames), rng)
    images = np.empty((len(frames), *size, 3), np.uint8)
    for frame, draw, out in zip(frames, draws, images, strict=True):
        planes = _resized_planes(frame_pixels(frame), size, block=16)
        if augment is None:
            _join_channels(planes, out)
        else:
            _augment(planes, draw, augment, out)
    return images


def grey_images(count: int, spec: ImageSpec) -> np.ndarray:
    """uint8 (count, size, size, 3) of GREY_LEVEL: what any frame of this level becomes, in training and evaluation."""
    return np.full((count, spec.size, spec.size, 3), GREY_LEVEL, np.uint8)


def prepare_eval_image(rgb: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Upright camera frame uint8 (H, W, 3) -> uint8 (size, size, 3): JPEG round trip, resize, central crop.

    The simulator renders upside down; the 180 degree rotation belongs to the simulator adapter, so that this function
    sees frames as the training data holds them.
    """
    _check_image(rgb)
    if spec.jpeg_quality is not None:
        rgb = decode_jpeg(encode_jpeg(np.ascontiguousarray(rgb), spec.jpeg_quality))
    resized = resize_lanczos3(rgb, (spec.size, spec.size))
    return center_crop(resized, spec.crop_area) if spec.center_crop else resized


def _check_image(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image is {found}, expected uint8 (H, W, 3)")
