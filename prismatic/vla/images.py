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
from typing import Any

import numpy as np
from PIL import Image

from prismatic.vla.image_augmentation import AugmentSettings, augment_planes, draw_numbers
from prismatic.vla.image_resampling import center_crop, check_image, join_channels, resize_lanczos3, resized_planes

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
    check_image(image)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality, subsampling=2)
    return buffer.getvalue()


def frame_pixels(frame: bytes | np.ndarray) -> np.ndarray:
    """Stored frame (JPEG or PNG bytes, or uint8 (H, W, 3)) -> uint8 (H, W, 3). ValueError for anything else."""
    if isinstance(frame, bytes):
        return decode_image(frame)
    check_image(frame)
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
    draws: Sequence[Any] | np.ndarray = [None] * len(frames)
    if augment is not None:
        assert rng is not None  # it comes with `augment`
        draws = draw_numbers(len(frames), rng)
    images = np.empty((len(frames), *size, 3), np.uint8)
    for frame, draw, out in zip(frames, draws, images, strict=True):
        planes = resized_planes(frame_pixels(frame), size, block=16)
        if augment is None:
            join_channels(planes, out)
        else:
            augment_planes(planes, draw, augment, out)
    return images


def grey_images(count: int, spec: ImageSpec) -> np.ndarray:
    """uint8 (count, size, size, 3) of GREY_LEVEL: what any frame of this level becomes, in training and evaluation."""
    return np.full((count, spec.size, spec.size, 3), GREY_LEVEL, np.uint8)


def prepare_eval_image(rgb: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Upright camera frame uint8 (H, W, 3) -> uint8 (size, size, 3): JPEG round trip, resize, central crop.

    The simulator renders upside down; the 180 degree rotation belongs to the simulator adapter, so that this function
    sees frames as the training data holds them.
    """
    check_image(rgb)
    if spec.jpeg_quality is not None:
        rgb = decode_jpeg(encode_jpeg(np.ascontiguousarray(rgb), spec.jpeg_quality))
    resized = resize_lanczos3(rgb, (spec.size, spec.size))
    return center_crop(resized, spec.crop_area) if spec.center_crop else resized
