import colorsys
import json

import numpy as np
import pytest

from prismatic.vla.image_augmentation import AugmentSettings, augment_images
from prismatic.vla.image_resampling import crop_and_resize, resize_lanczos3
from prismatic.vla.images import (
    ImageSpec,
    decode_jpeg,
    encode_jpeg,
    prepare_eval_image,
    prepare_train_image,
    prepare_train_images,
)

IDENTITY = AugmentSettings(crop_area=1.0, brightness=0.0, contrast=(1.0, 1.0), saturation=(1.0, 1.0), hue=0.0)


def smooth_images(count=2, side=48):
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([resize_lanczos3(image, (side, side)) for image in coarse])


def test_image_spec_round_trip_and_limits():
    spec = ImageSpec(size=96, jpeg_quality=None, center_crop=False, crop_area=0.8)
    assert ImageSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for fields in ({"size": 0}, {"jpeg_quality": 0}, {"crop_area": 1.5}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            ImageSpec(**fields)
    with pytest.raises(ValueError, match="expected"):
        ImageSpec.from_dict({"size": 96})


@pytest.mark.parametrize("data", [b"", b"no image", encode_jpeg(np.zeros((16, 16, 3), np.uint8))[:-40]])
def test_broken_jpeg(data):
    with pytest.raises(ValueError, match="JPEG"):
        decode_jpeg(data)


def test_resize_keeps_constant_images_and_same_size():
    image = np.full((40, 56, 3), 137, np.uint8)
    np.testing.assert_array_equal(resize_lanczos3(image, (23, 71)), np.full((23, 71, 3), 137))
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_lanczos3(noise, (9, 9)), noise)


def test_crop_samples_corner_pixels():
    planes = np.arange(25, dtype=np.float32).reshape(1, 1, 5, 5)
    cropped = crop_and_resize(planes, np.array([[0.25, 0.5, 0.75, 1.0]]), 3)
    np.testing.assert_allclose(cropped[0, 0], [[7, 8, 9], [12, 13, 14], [17, 18, 19]])
    np.testing.assert_allclose(crop_and_resize(planes, np.array([[0, 0, 1, 1]]), 5), planes)


def test_train_image_without_resize_is_the_decoded_frame():
    jpeg = encode_jpeg(smooth_images()[0])
    np.testing.assert_array_equal(prepare_train_image(jpeg, ImageSpec(size=48)), decode_jpeg(jpeg))


def test_train_images_are_resized_and_augmented():
    frames = [encode_jpeg(smooth_images()[0]), np.ascontiguousarray(smooth_images()[1][:40])]
    spec = ImageSpec(size=32)
    prepared = np.stack([prepare_train_image(frame, spec) for frame in frames])
    np.testing.assert_array_equal(prepare_train_images(frames, spec), prepared)
    expected = augment_images(prepared, np.random.default_rng(4), AugmentSettings())
    actual = prepare_train_images(frames, spec, AugmentSettings(), np.random.default_rng(4))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (96, 96), (240, 320), (7, 5)])
def test_training_resizes_like_the_full_product(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    difference = np.abs(prepare_train_image(image, ImageSpec()).astype(int) - resize_lanczos3(image, (224, 224)))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_evaluation_matches_training_frames():
    frame = smooth_images()[0]
    spec = ImageSpec(size=48, jpeg_quality=95, center_crop=False)
    np.testing.assert_array_equal(prepare_eval_image(frame, spec), prepare_train_image(encode_jpeg(frame, 95), spec))


def test_identity_augmentation_is_exact():
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    images[0] = np.arange(400, dtype=np.uint16).reshape(20, 20, 1) % 256  # greys: no chroma
    np.testing.assert_array_equal(augment_images(images, np.random.default_rng(1), IDENTITY), images)


def test_augmentation_is_a_function_of_the_generator_and_does_not_touch_its_input():
    images = smooth_images()
    before = images.copy()
    first, again, other = (augment_images(images, np.random.default_rng(seed), AugmentSettings()) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    np.testing.assert_array_equal(images, before)
    assert (first.dtype, first.shape) == (np.uint8, images.shape)


def test_cameras_get_their_own_draws():
    image = smooth_images(1)
    augmented = augment_images(np.concatenate([image, image]), np.random.default_rng(1), AugmentSettings())
    assert (augmented[0] != augmented[1]).mean() > 0.5


def test_draws_of_a_camera_do_not_depend_on_the_others_content():
    images = smooth_images()
    changed = images.copy()
    changed[1] = 255 - changed[1]
    first, second = (augment_images(x, np.random.default_rng(3), AugmentSettings())[0] for x in (images, changed))
    np.testing.assert_array_equal(first, second)


def only(**fields):
    return AugmentSettings(**({**IDENTITY.__dict__} | fields))


def test_brightness_is_one_offset_per_image_within_range():
    images = np.full((40, 8, 8, 3), 128, np.uint8)
    shifts = augment_images(images, np.random.default_rng(0), only(brightness=0.2)).astype(int) - 128
    assert np.all(shifts == shifts[:, :1, :1, :1])
    assert 30 < shifts.max() <= 52 and -52 <= shifts.min() < -30


def test_contrast_scales_around_the_channel_mean():
    images = smooth_images(20) // 2 + 64
    augmented = augment_images(images, np.random.default_rng(0), only(contrast=(0.8, 1.2))).astype(float)
    mean = images.mean(axis=(1, 2))
    np.testing.assert_allclose(augmented.mean(axis=(1, 2)), mean, atol=1)
    ratio = augmented.std(axis=(1, 2)) / images.std(axis=(1, 2))
    assert 0.78 < ratio.min() < 0.9 and 1.1 < ratio.max() < 1.22
    np.testing.assert_allclose(ratio, ratio[:, :1] * np.ones(3), atol=0.02)


@pytest.mark.parametrize(
    ("saturation", "hue"),
    [(1.2, 0.0), (0.8, 0.0), (1.0, 0.05), (1.0, -0.05), (1.2, 0.03), (0.9, 0.16), (1.1, -0.2), (1.0, 0.5), (1.2, 0.8)],
)
def test_saturation_and_hue_follow_the_hsv_definition(saturation, hue):
    images = np.random.default_rng(2).integers(0, 256, (1, 12, 12, 3), dtype=np.uint8)
    images[0, 0] = np.arange(12, dtype=np.uint8)[:, None] * 20  # greys
    images[0, 1] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]] * 2
    settings = only(saturation=(saturation, saturation), hue=abs(hue))
    # Equal bounds fix the saturation; for the hue the last of the six draws is set to an end of its range.
    draws = np.full((1, 6), 0.5)
    draws[0, 5] = 1.0 if hue > 0 else 0.0

    class FixedDraws:
        def random(self, shape, dtype):
            assert shape == draws.shape
            return draws.astype(dtype)

    augmented = augment_images(images, FixedDraws(), settings)
    for source, result in zip(images.reshape(-1, 3), augmented.reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(source / 255))
        expected = np.array(colorsys.hsv_to_rgb((h + hue) % 1.0, min(s * saturation, 1.0), v)) * 255.5
        assert np.abs(result - np.floor(np.minimum(expected, 255))).max() <= 1


def test_colours_of_large_images_are_those_of_small_ones():
    image = np.random.default_rng(2).integers(0, 256, (1, 65, 65, 3), dtype=np.uint8)
    settings = only(brightness=0.1, saturation=(0.8, 1.2), hue=0.05)
    large = augment_images(np.tile(image, (1, 2, 2, 1)), np.random.default_rng(8), settings)  # more than one block
    small = augment_images(image, np.random.default_rng(8), settings)
    np.testing.assert_array_equal(large, np.tile(small, (1, 2, 2, 1)))


def test_crop_keeps_ninety_percent_with_independent_offsets():
    # A ramp along y in the red and along x in the green channel shows where the corners were taken.
    side = 201
    ramp = np.linspace(0, 250, side).round().astype(np.uint8)
    image = np.zeros((1, side, side, 3), np.uint8)
    image[0, :, :, 0], image[0, :, :, 1] = ramp[:, None], ramp[None]
    corners = []
    for seed in range(60):
        cropped = augment_images(image, np.random.default_rng(seed), only(crop_area=0.9))[0].astype(int)
        assert abs(cropped[-1, 0, 0] - cropped[0, 0, 0] - 250 * np.sqrt(0.9)) <= 2
        corners.append((cropped[0, 0, 0], cropped[0, 0, 1]))
    corners = np.array(corners)
    assert corners.max() <= 250 * (1 - np.sqrt(0.9)) + 1
    assert abs(np.corrcoef(corners.T)[0, 1]) < 0.4


def test_augmentation_needs_square_uint8_batches():
    for wrong in (np.zeros((2, 8, 9, 3), np.uint8), np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected"):
            augment_images(wrong, np.random.default_rng(0), IDENTITY)


def test_wrong_image_type_is_named():
    with pytest.raises(ValueError, match="float64"):
        prepare_eval_image(np.zeros((8, 8, 3)), ImageSpec())
