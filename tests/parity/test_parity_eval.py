"""Evaluation-time pre- and post-processing against reference numbers."""

import re

import numpy as np
import pytest
import torch
from parity_fixtures import OTHER_DCT, assert_levels, read_json
from PIL import Image

from experiments.robot.libero.controls import WAIT_ACTION, to_simulator_actions
from experiments.robot.libero.simulator import quat_to_axis_angle
from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.action_tokenizer import ActionTokenizer
from prismatic.vla.image_resampling import center_crop, resize_lanczos3
from prismatic.vla.images import ImageSpec, decode_jpeg, encode_jpeg, prepare_eval_image
from prismatic.vla.normalization import Normalizer, load_statistics

TABLE = 1e-12
PIXELS = 1e-6
BOUNDS = ("bounds", "bounds_q99")


@pytest.fixture(scope="module")
def folder(golden_dir):
    return golden_dir / "eval"


@pytest.fixture(scope="module")
def images(folder):
    return dict(np.load(folder / "images.npz"))


@pytest.fixture(scope="module")
def pixels(folder):
    return dict(np.load(folder / "pixel_values.npz"))


def numbered(arrays, pattern):
    """(match, array) of all arrays whose names fit; there must be some."""
    found = [(match, array) for name, array in arrays.items() if (match := re.fullmatch(pattern, name))]
    assert found, pattern
    return found


def upright(images, index):
    return np.ascontiguousarray(images[f"raw_{index}"][::-1, ::-1])


# Images


def test_every_frame_went_through_all_stages(folder, images):
    frames = {str(index) for index in range(len(read_json(folder / "frames.json")["frames"]))}
    for pattern in (r"raw_(\d+)", r"resized\d+_(\d+)", r"center_crop_(\d+)", r"jpeg_bytes_len_(\d+)"):
        assert {match[1] for match, _ in numbered(images, pattern)} == frames


def test_jpeg_round_trip(images):
    for match, length in numbered(images, r"jpeg_bytes_len_(\d+)"):
        assert len(encode_jpeg(upright(images, match[1]), ImageSpec().jpeg_quality)) == length
    for match, reference in numbered(images, r"jpeg_roundtrip_(\d+)"):
        decoded = decode_jpeg(encode_jpeg(upright(images, match[1]), ImageSpec().jpeg_quality))
        assert_levels(decoded, reference, **OTHER_DCT, what=match[0])


def test_resize_after_the_same_round_trip(images):
    for match, roundtrip in numbered(images, r"jpeg_roundtrip_(\d+)"):
        ((_, reference),) = numbered(images, rf"resized\d+_{match[1]}")
        resized = resize_lanczos3(roundtrip, reference.shape[:2])
        assert_levels(resized, reference, most=1, fraction=1e-3, what=match[0])


def test_center_crop_of_the_same_image(images):
    for match, resized in numbered(images, r"resized\d+_(\d+)"):
        cropped = center_crop(resized, ImageSpec().crop_area)
        assert_levels(cropped, images[f"center_crop_{match[1]}"], most=1, fraction=1e-3, what=match[0])


def test_whole_preparation(images):
    for match, resized in numbered(images, r"resized(\d+)_(\d+)"):
        size, index = int(match[1]), match[2]
        for crop, reference in ((False, resized), (True, images[f"center_crop_{index}"])):
            prepared = prepare_eval_image(upright(images, index), ImageSpec(size=size, center_crop=crop))
            assert_levels(prepared, reference, **OTHER_DCT, what=f"{match[0]}, crop {crop}")


def test_preparation_of_a_frame_that_is_not_square(images):
    ((match, reference),) = numbered(images, r"resized(\d+)_other_size")
    spec = ImageSpec(size=int(match[1]), center_crop=False)
    assert_levels(prepare_eval_image(images["raw_other_size"], spec), reference, **OTHER_DCT)


# Pixel values


@pytest.fixture(scope="module")
def process(images):
    """process(uint8 image) -> (channels, H, W) at the size of the stored crops."""
    size = numbered(images, r"center_crop_(\d+)")[0][1].shape[0]
    processor = PrismaticImageProcessor(input_sizes=[[3, size, size]] * 2)
    return lambda image: processor(Image.fromarray(image))["pixel_values"][0]


@pytest.fixture(scope="module")
def probe(pixels):
    """Index of the sampled places."""
    return tuple(pixels[f"probe_{axis}"] for axis in ("channel", "row", "col"))


def test_pixel_values_at_the_probes(images, pixels, process, probe):
    for match, values in numbered(pixels, r"values_(\d+)"):
        found = process(images[f"center_crop_{match[1]}"]).numpy()
        np.testing.assert_allclose(found[probe], values, rtol=0, atol=PIXELS, err_msg=match[0])


def test_pixel_values_per_channel(images, pixels, process):
    for match, mean in numbered(pixels, r"mean_(\d+)"):
        found = process(images[f"center_crop_{match[1]}"]).double().numpy()
        assert len(found) == len(mean)
        np.testing.assert_allclose(found.mean(axis=(1, 2)), mean, rtol=0, atol=PIXELS)
        np.testing.assert_allclose(found.std(axis=(1, 2)), pixels[f"std_{match[1]}"], rtol=0, atol=PIXELS)


def test_pixel_values_of_stored_rows(images, pixels, process):
    for match, reference in numbered(pixels, r"pixel_values_(\d+)_rows_(\d+)_(\d+)"):
        index, first, last = (int(group) for group in match.groups())
        found = process(images[f"center_crop_{index}"])[:, first:last].numpy()
        np.testing.assert_allclose(found, reference, rtol=0, atol=PIXELS)


def test_pixel_values_as_bfloat16(images, pixels, process, probe):
    for match, reference in numbered(pixels, r"values_(\d+)_bf16_as_f32"):
        found = process(images[f"center_crop_{match[1]}"]).to(torch.bfloat16).float().numpy()[probe]
        # A float32 difference of one unit can round to the other neighbour.
        np.testing.assert_allclose(found, reference, rtol=2**-7, atol=0)
        assert (found == reference).mean() > 0.98


def test_resize_inside_the_processor(images, pixels, process, probe):
    ((_, reference),) = numbered(pixels, r"from_raw\d+_bicubic_values")
    np.testing.assert_allclose(process(images["raw_0"]).numpy()[probe], reference, rtol=0, atol=PIXELS)


# Robot state


@pytest.mark.parametrize(("suffix", "name"), [("", "axis_angle"), ("_f32", "axis_angle_from_f32")])
def test_axis_angle_of_quaternions(folder, suffix, name):
    table = np.load(folder / "quat_axisangle.npz")
    found = np.array([quat_to_axis_angle(quat) for quat in table[f"quat_xyzw{suffix}"]])
    # Float32 input is processed in float32; near the identity one unit of w moves the angle.
    np.testing.assert_allclose(found, table[name], rtol=0, atol=1e-6 if suffix else TABLE)


def test_state_of_an_observation(images):
    for match, state in numbered(images, r"obs(\d+)_state"):
        position, quat, fingers = (images[f"obs{match[1]}_{n}"] for n in ("eef_pos", "eef_quat", "gripper_qpos"))
        found = np.concatenate([position, quat_to_axis_angle(quat), fingers])
        np.testing.assert_allclose(found, state, rtol=0, atol=TABLE)


@pytest.fixture(scope="module")
def statistics(folder):
    ((_, statistics),) = load_statistics(folder / "statistics.json").items()
    return statistics


def make_normalizer(statistics, kind):
    dims = {f"{group}_dim": len(statistics[group]["mean"]) for group in ("action", "proprio")}
    return Normalizer(statistics, ActionSpec(normalization=kind, **dims))


@pytest.mark.parametrize("kind", BOUNDS)
def test_normalised_proprio(folder, statistics, kind):
    table, normalizer = np.load(folder / "proprio.npz"), make_normalizer(statistics, kind)
    published = normalizer.normalize_proprio(table["state"], zero_constant=False)
    np.testing.assert_allclose(published, table[f"normalised_{kind}"], rtol=0, atol=TABLE)


@pytest.mark.parametrize("kind", BOUNDS)
def test_training_differs_from_evaluation_in_constant_proprio_dimensions_only(folder, statistics, kind):
    table, normalizer = np.load(folder / "proprio.npz"), make_normalizer(statistics, kind)
    constant = np.equal(statistics["proprio"]["min"], statistics["proprio"]["max"])
    trained, published = normalizer.normalize_proprio(table["state"]), table[f"normalised_{kind}"]
    assert np.all(trained[:, constant] == 0)
    np.testing.assert_allclose(trained[:, ~constant], published[:, ~constant], rtol=0, atol=TABLE)


# Actions


@pytest.mark.parametrize("kind", BOUNDS)
def test_unnormalised_actions(folder, statistics, kind):
    table = np.load(folder / "unnormalise.npz")
    actions = make_normalizer(statistics, kind).unnormalize_action(table["normalised"])
    assert actions.dtype == np.float64
    np.testing.assert_allclose(actions, table[f"unnormalised_{kind}"], rtol=0, atol=TABLE)


def test_gripper(folder):
    table = np.load(folder / "gripper.npz")
    np.testing.assert_allclose(to_simulator_actions(table["actions"]), table["processed"], rtol=0, atol=TABLE)
    np.testing.assert_array_equal(WAIT_ACTION, table["wait_action"])


@pytest.fixture(scope="module")
def token_table(folder):
    return np.load(folder / "action_tokenizer.npz")


@pytest.fixture(scope="module")
def action_tokenizer(golden_dir, token_table):
    vocab_size = read_json(golden_dir / "prompts" / "prompts.json")["tokenizer"]["vocab_size"]
    edges = token_table["bins"]
    return ActionTokenizer(vocab_size, bins=len(edges), low=edges[0], high=edges[-1])


def test_action_bins(action_tokenizer, token_table):
    np.testing.assert_allclose(action_tokenizer.bins, token_table["bins"], rtol=0, atol=TABLE)
    np.testing.assert_allclose(action_tokenizer.bin_centers, token_table["bin_centers"], rtol=0, atol=TABLE)


@pytest.mark.parametrize("suffix", ["", "_f32"])
def test_action_token_ids(action_tokenizer, token_table, suffix):
    ids = action_tokenizer.encode(token_table[f"values{suffix}"])
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, token_table[f"token_ids{suffix}"])


def test_action_token_is_the_vocabulary_size_minus_the_bin(action_tokenizer, token_table):
    ids = action_tokenizer.vocab_size - token_table["digitize"]
    np.testing.assert_array_equal(action_tokenizer.encode(token_table["values"]), ids)


@pytest.mark.parametrize(("ids", "values"), [("token_ids", "decoded"), ("all_ids", "all_decoded")])
def test_decoded_action_tokens(action_tokenizer, token_table, ids, values):
    np.testing.assert_allclose(action_tokenizer.decode(token_table[ids]), token_table[values], rtol=0, atol=TABLE)
