"""Image preprocessing shared by training and evaluation, in numpy and Pillow.

Images are uint8 (H, W, 3) RGB. Resize and crop follow TensorFlow's `resize(lanczos3, antialias)` and
`crop_and_resize`, which published policies were trained with.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from PIL import Image


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


def _decode(data: bytes, formats: tuple[str, ...]) -> np.ndarray:
    kind = " or ".join(formats)
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's PNG reader raises SyntaxError
        raise ValueError(f"not a complete {kind} image ({len(data)} bytes): {error}") from error
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"{kind} image has shape {pixels.shape}, expected (H, W, 3)")
    return pixels


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """uint8 (H, W, 3) -> JPEG bytes with 4:2:0 chroma."""
    _check_image(image)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality, subsampling=2)
    return buffer.getvalue()


def resize_lanczos3(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (h, w, 3) with an antialiased Lanczos kernel of radius 3, rounded and clipped."""
    _check_image(image)
    height, width = image.shape[:2]
    if (height, width) == tuple(size):
        return image
    rows, columns = _lanczos3_weights(height, size[0]), _lanczos3_weights(width, size[1])
    planes = _to_planes(image[None])[0].astype(np.float32)
    resized = rows @ planes @ columns.T
    levels = np.clip(np.rint(resized, out=resized), 0, 255, out=resized).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(1, 2, 0))


@lru_cache(maxsize=16)
def _lanczos3_weights(in_size: int, out_size: int) -> np.ndarray:
    """(out, in) float32 weights with unit row sums; the kernel widens when shrinking (antialias)."""
    step = in_size / out_size
    centers = (np.arange(out_size) + 0.5) * step
    distance = np.abs(np.arange(in_size) + 0.5 - centers[:, None]) / max(step, 1.0)
    weights = np.where(distance < 3.0, np.sinc(distance) * np.sinc(distance / 3.0), 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def crop_and_resize(planes: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """Bilinear crops with aligned corners: the box corners are sampled by the corner pixels of the output.

    planes (n, C, H, W) uint8 or float32; boxes (n, 4) as y0, x0, y1, x1 in [0, 1], where 1 is the last pixel centre;
    returns (n, C, size, size) float32 in the range of the input.
    """
    count, channels, height, width = planes.shape
    cropped = np.empty((count, channels, size, size), dtype=np.float32)
    for plane, box, out in zip(planes, boxes, cropped, strict=True):
        low, high, fraction = _bilinear_taps(box[0], box[2], height, size)
        rows = _blend(plane[:, low], plane[:, high], fraction[:, None])  # rows first: whole rows copy fastest
        low, high, fraction = _bilinear_taps(box[1], box[3], width, size)
        out[:] = _blend(rows[:, :, low], rows[:, :, high], fraction)
    return cropped


def _bilinear_taps(start: float, stop: float, in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    position = np.linspace(start * (in_size - 1), stop * (in_size - 1), out_size)
    low = np.clip(position.astype(np.intp), 0, in_size - 1)
    high = np.minimum(low + 1, in_size - 1)
    return low, high, (position - low).astype(np.float32)


def _blend(low: np.ndarray, high: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    low = low.astype(np.float32, copy=False)
    blended = high.astype(np.float32)
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
    planes = _to_planes(image[None]).astype(np.float32) / np.float32(255.0)
    return _to_images(crop_and_resize(planes, box, image.shape[0]))[0]


def augment_images(images: np.ndarray, rng: np.random.Generator, settings: AugmentSettings) -> np.ndarray:
    """Random crop, brightness, contrast, saturation and hue, in this order; own draws per image.

    images (n, S, S, 3) uint8 -> same shape uint8. Six uniform numbers per image are taken from `rng`. Values are
    clipped to [0, 1] after each operation.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ValueError(f"images have shape {images.shape} {images.dtype}, expected (n, S, S, 3) uint8")
    draws = rng.random((len(images), 6), dtype=np.float64)
    side = np.sqrt(settings.crop_area)
    corner = draws[:, :2] * (1.0 - side)
    planes = crop_and_resize(_to_planes(images), np.concatenate([corner, corner + side], axis=1), images.shape[1])
    planes *= np.float32(1.0 / 255.0)
    factors = (
        _between(draws[:, 2], -settings.brightness, settings.brightness),
        _between(draws[:, 3], *settings.contrast),
        _between(draws[:, 4], *settings.saturation),
        _between(draws[:, 5], -settings.hue, settings.hue),
    )
    brightness, contrast, saturation, hue = (factor.astype(np.float32)[:, None, None] for factor in factors)
    planes += brightness[..., None]
    np.clip(planes, 0.0, 1.0, out=planes)
    mean = planes.mean(axis=(2, 3), keepdims=True)
    planes -= mean
    planes *= contrast[..., None]
    planes += mean
    np.clip(planes, 0.0, 1.0, out=planes)
    return _to_images(_shift_saturation_hue(planes, saturation, hue))


def _between(draw: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + draw * (high - low)


def _shift_saturation_hue(planes: np.ndarray, saturation: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """HSV saturation scaling (clipped at 1) and hue shift (in turns), planes (n, 3, H, W) in [0, 1].

    Both keep the value V = max(R, G, B), and the saturation does not change the hue, so one pass over the HSV
    hexagon does both: channel c of hue h is V - chroma * clip(min(k, 4 - k), 0, 1), k = (offset_c + 6 h) mod 6.
    """
    red, green, blue = planes[:, 0], planes[:, 1], planes[:, 2]
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    safe = np.where(chroma > 0.0, chroma, np.float32(1.0))
    sector = np.where(
        value == red,
        (green - blue) / safe,
        np.where(value == green, (blue - red) / safe + np.float32(2.0), (red - green) / safe + np.float32(4.0)),
    )
    sector += np.float32(6.0) * hue
    chroma = np.minimum(chroma * saturation, value)
    shifted = np.empty_like(planes)
    for channel, offset in enumerate((5.0, 3.0, 1.0)):
        k = sector + np.float32(offset)
        k -= np.float32(6.0) * np.floor(k * np.float32(1.0 / 6.0))
        np.minimum(k, np.float32(4.0) - k, out=k)
        np.clip(k, 0.0, 1.0, out=k)
        np.subtract(value, chroma * k, out=shifted[:, channel])
    return np.clip(shifted, 0.0, 1.0, out=shifted)


def _to_planes(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _to_images(planes: np.ndarray) -> np.ndarray:
    """(n, 3, H, W) float32 in [0, 1] -> (n, H, W, 3) uint8 as trunc(255.5 v), TensorFlow's conversion."""
    scaled = planes * np.float32(255.5)
    levels = np.minimum(scaled, np.float32(255.0), out=scaled).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))


def prepare_train_image(frame: bytes | np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Stored frame (JPEG or PNG bytes, or uint8 (H, W, 3)) -> uint8 (size, size, 3). Crops belong to augmentation."""
    pixels = decode_image(frame) if isinstance(frame, bytes) else frame
    return resize_lanczos3(pixels, (spec.size, spec.size))


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
