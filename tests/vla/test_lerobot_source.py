import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_writers import (
    CAMERAS,
    FPS,
    LEROBOT_KEYS,
    LOSSLESS,
    make_smooth_episode,
    png_of,
    write_lerobot_v21,
    write_lerobot_v30,
    write_video,
)

from prismatic.vla.datasets import lerobot_index, lerobot_source, lerobot_video
from prismatic.vla.datasets.lerobot_source import LeRobotSource
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError, SourceKeys
from prismatic.vla.images import decode_image, decode_jpeg, encode_jpeg

FIRST, SECOND = CAMERAS.values()
INFO = "meta/info.json"
V30_EPISODES = "meta/episodes/chunk-000/file-000.parquet"
V21_DATA = "data/chunk-000/episode_000001.parquet"


@pytest.fixture(scope="module")
def episodes():
    return [make_smooth_episode(i, 6 + i, ["push the plate", "open the drawer"][i % 2], side=16) for i in range(3)]


@pytest.fixture
def v21(tmp_path, episodes):
    return write_lerobot_v21(tmp_path / "v21", episodes)


@pytest.fixture
def v30(tmp_path, episodes):
    return write_lerobot_v30(tmp_path / "v30", episodes)


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_table(path, column, change):
    """Replace the values of a column by `change(values)`, drop it for `...`."""
    table = pq.read_table(path)
    number = table.column_names.index(column)
    if change is ...:
        table = table.remove_column(number)
    else:
        table = table.set_column(number, column, pa.array(change(table[column].to_pylist())))
    pq.write_table(table, path)


def open_fails(folder, message, error=DataSetError, keys=LEROBOT_KEYS, split="train"):
    with pytest.raises(error, match=message) as caught:
        LeRobotSource(folder, keys, split)
    assert str(folder) in str(caught.value)
    assert not list(folder.glob(".craft_index/*/index.json"))


def test_importing_is_light_and_silent():
    code = "import sys; import prismatic.vla.datasets.lerobot_source, prismatic.vla.datasets.hdf5_source; "
    code += "print(sorted({'av', 'pyarrow', 'h5py'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert (out.stdout, out.stderr) == ("[]\n", "")


# Selection


def test_splits(tmp_path, episodes):
    for write in (write_lerobot_v21, write_lerobot_v30):
        folder = write(tmp_path / write.__name__, episodes)
        edit_json(folder / INFO, splits={"train": "0:2", "val": "2:3"})
        train, val = (LeRobotSource(folder, LEROBOT_KEYS, split) for split in ("train", "val"))
        assert (train.lengths.tolist(), val.lengths.tolist()) == ([6, 7], [8])
        np.testing.assert_array_equal(val.actions(0), episodes[2].actions)
        assert val.frame(FIRST, 0, 7) == png_of(episodes[2].images["image"][7])


@pytest.mark.parametrize("declared", ["3:4", "1:1", "all", 3, "-1:2", "0:99999999999999999999", "9:999"])
def test_bad_splits(v21, declared):
    edit_json(v21 / INFO, splits={"train": declared})
    open_fails(v21, r"info.json: split 'train' is .*, expected first:last within 0:3")


def test_missing_split(v30):
    open_fails(v30, r"no split 'val', found splits \['train'\]", split="val")


def test_one_camera_and_several_state_keys(v21, episodes):
    info = json.loads((v21 / INFO).read_text())
    keys = SourceKeys("lerobot", (SECOND,), ("observation.state", "timestamp", "action"), "action")
    edit_json(v21 / INFO, features={key: value for key, value in info["features"].items() if key != FIRST})
    source = LeRobotSource(v21, keys)
    assert source.state(0).shape == (6, 8 + 1 + 7) and source.state(0).dtype == np.float32
    np.testing.assert_array_equal(source.state(0)[:, 9:], episodes[0].actions)
    np.testing.assert_allclose(source.state(0)[:, 8], np.arange(6) / FPS)
    with pytest.raises(MissingFeatureError, match=f"no camera '{FIRST}', opened with"):
        source.frame(FIRST, 0, 0)
    with pytest.raises(IndexError, match="episode 2: step 8, expected 0 <= step < 8"):
        source.frame(SECOND, 2, 8)


@pytest.mark.parametrize("images", ["png", "video"])
def test_rotated_frames(tmp_path, episodes, images):
    folder = write_lerobot_v21(tmp_path, episodes, images, LOSSLESS)
    keys = SourceKeys("lerobot", LEROBOT_KEYS.cameras, LEROBOT_KEYS.state, LEROBOT_KEYS.action, rotated=True)
    expected = decode_jpeg(episodes[1].images["image"][3])[::-1, ::-1]
    np.testing.assert_array_equal(LeRobotSource(folder, keys).frame(FIRST, 1, 3), expected)


def test_wrong_format():
    with pytest.raises(ValueError, match="format is 'hdf5', expected 'lerobot'"):
        LeRobotSource("anywhere", SourceKeys("hdf5", ("a",), ("b",), "c"))


def test_double_and_fixed_size_columns(v21, episodes):
    original = LeRobotSource(v21, LEROBOT_KEYS).fingerprint
    path = v21 / V21_DATA
    table = pq.read_table(path)
    for column, kind, width in (("action", pa.float64(), 7), ("observation.state", pa.float32(), 8)):
        values = pa.array(table[column].to_pylist(), pa.list_(kind, width))
        table = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(table, path, row_group_size=2)
    source = LeRobotSource(v21, LEROBOT_KEYS)
    np.testing.assert_array_equal(source.actions(1), episodes[1].actions)
    assert source.fingerprint == original  # the numbers are the same


def test_declared_channels_first(v21):
    info = json.loads((v21 / INFO).read_text())
    info["features"][FIRST]["shape"] = [3, 16, 16]
    edit_json(v21 / INFO, features=info["features"])
    assert LeRobotSource(v21, LEROBOT_KEYS).lengths.tolist() == [6, 7, 8]


def test_tasks_as_the_index_of_a_table(v30):
    path = v30 / "meta" / "tasks.parquet"
    table = pq.read_table(path).rename_columns(["task_index", "__index_level_0__"])
    pq.write_table(table, path)
    source = LeRobotSource(v30, LEROBOT_KEYS)
    assert list(source.instructions) == ["push the plate", "open the drawer", "push the plate"]


def test_lost_image_files_of_the_index_are_built_again(v21):
    source = LeRobotSource(v21, LEROBOT_KEYS)
    frame = source.frame(FIRST, 2, 2)
    (blob,) = v21.glob(".craft_index/*/images-0.blob")
    blob.unlink()
    assert LeRobotSource(v21, LEROBOT_KEYS).frame(FIRST, 2, 2) == frame


# Metadata that is damaged or contradictory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebase_version": "v1.6"}, "codebase_version is 'v1.6', expected v2.0, v2.1, v3.0"),
        ({"codebase_version": ...}, "codebase_version is None, expected str"),
        ({"fps": 10**400}, "found a number of 401 digits"),
        ({"features": []}, r"features is \[\], expected dict"),
        ({"splits": ["train"]}, r"splits is \['train'\], expected {name: first:last}"),
        ({"chunks_size": 0}, "chunks_size is 0, expected a positive integer"),
        ({"chunks_size": True}, "chunks_size is True, expected int"),
        ({"data_path": "{nothing}"}, "data_path '{nothing}' cannot be filled"),
        ({"data_path": "../x"}, "data_path gives '../x', expected a path inside the data set"),
        ({"data_path": "data/absent"}, "absent is missing"),
    ],
)
def test_wrong_info(v21, changes, message):
    edit_json(v21 / INFO, **changes)
    open_fails(v21, message)


@pytest.mark.parametrize(
    ("key", "feature", "message"),
    [
        (FIRST, {"dtype": "float32", "shape": [16, 16, 3]}, "dtype 'float32', expected 'video' or 'image'"),
        (FIRST, {"dtype": "image", "shape": [16, 16]}, r"shape \(16, 16\), expected \(H, W, 3\)"),
        (FIRST, {"dtype": "image", "shape": [16, 17, 3]}, r"image \(16, 16, 3\), but declared as \(16, 17, 3\)"),
        (FIRST, {"dtype": "video", "shape": [16, 16, 3]}, "image/episode_000000.mp4 is missing"),
        (FIRST, {"dtype": "image", "shape": [99999, 99999, 3]}, r"shape \(99999, 99999, 3\), expected at most"),
        ("action", {"dtype": "float32", "shape": [0]}, r"shape \[0\], expected positive integers"),
        ("action", {"dtype": "float32", "shape": [6]}, r"action: \[7\] values per step, expected 6"),
        ("action", None, "features: action is None, expected dict"),
    ],
)
def test_wrong_features(v21, key, feature, message):
    features = json.loads((v21 / INFO).read_text())["features"]
    edit_json(v21 / INFO, features=features | {key: feature})
    open_fails(v21, message)


def test_undeclared_features_are_listed(v21):
    keys = SourceKeys("lerobot", (FIRST,), ("state",), "action")
    open_fails(v21, r"no feature 'state', found \['action', 'frame_index'", MissingFeatureError, keys)


@pytest.mark.parametrize("name", [INFO, "meta/episodes.jsonl", V21_DATA])
def test_missing_and_damaged_files_v21(v21, name):
    content = (v21 / name).read_bytes()
    (v21 / name).write_bytes(b"{" + content[: len(content) // 2])
    open_fails(v21, re.escape(name))
    (v21 / name).unlink()
    open_fails(v21, f"{re.escape(name)} is missing")


@pytest.mark.parametrize("name", [INFO, V30_EPISODES, "data/chunk-000/file-001.parquet"])
def test_missing_and_damaged_files_v30(v30, name):
    content = (v30 / name).read_bytes()
    (v30 / name).write_bytes(b"{" + content[: len(content) // 2])
    open_fails(v30, re.escape(name))
    (v30 / name).unlink()
    open_fails(v30, f"{re.escape(name)} is missing|meta/episodes holds no chunk")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"episode_index": 2, "length": 6}, r"episode_index \[1, 2, 2\], expected distinct numbers from 0 on"),
        ({"episode_index": -1, "length": 6}, r"episode_index \[-1, 1, 2\], expected distinct numbers from 0 on"),
        ([], "line 1: expected an object, found list"),
    ],
)
def test_wrong_episode_lines(v21, line, message):
    path = v21 / "meta" / "episodes.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(line), *lines[1:]]))
    open_fails(v21, message)


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("episode_index", lambda values: [1, *values[1:]], r"episode_index \[1, 1, 2\], expected distinct"),
        ("data/file_index", lambda values: [0, 0, 0], "file-000.parquet: episode 2: no such rows among 13"),
        ("data/chunk_index", lambda values: [0, 0, 4], "chunk-004/file-001.parquet is missing"),
    ],
)
def test_wrong_episode_table(v30, column, change, message):
    edit_table(v30 / V30_EPISODES, column, change)
    open_fails(v30, message)


def test_missing_columns_of_the_episode_table(v30):
    edit_table(v30 / V30_EPISODES, "data/file_index", ...)
    open_fails(v30, r"no columns \['data/file_index'\], found \['data/chunk_index'", MissingFeatureError)


def test_order_of_episode_lines_does_not_matter(v21):
    path = v21 / "meta" / "episodes.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert LeRobotSource(v21, LEROBOT_KEYS).lengths.tolist() == [6, 7, 8]


def test_task_that_is_not_unicode(v21):
    (v21 / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "\\ud800"}\n{"task_index": 1, "task": "b"}\n')
    edit_lines = [json.dumps({"episode_index": i, "length": 6 + i}) for i in range(3)]
    (v21 / "meta" / "episodes.jsonl").write_text("\n".join(edit_lines))
    open_fails(v21, "episode 0: .*surrogates not allowed")


# What is not needed to read


def edit_line(folder, number, **changes):
    path = folder / "meta" / "episodes.jsonl"
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | changes)
    path.write_text("\n".join(lines))


def numbered(values):
    return [str(value) for value in values]


NEEDLESS_V21 = {
    "v2.0": (lambda d: edit_json(d / INFO, codebase_version="v2.0"), None),
    "no rate": (lambda d: edit_json(d / INFO, fps=...), None),
    "a rate of nothing": (lambda d: edit_json(d / INFO, fps=0), "fps is '0', expected a positive number"),
    "a rate of any size": (lambda d: edit_json(d / INFO, fps=10**39), "fps is .1000"),
    "a rate as text": (lambda d: edit_json(d / INFO, fps="10"), "fps is '10', expected a positive number"),
    "no tasks": (lambda d: (d / "meta/tasks.jsonl").unlink(), "tasks.jsonl is missing; episodes with one task"),
    "damaged tasks": (lambda d: (d / "meta/tasks.jsonl").write_text("{"), "line 1: expected JSON, one object"),
    "a length of nothing": (lambda d: edit_line(d, 0, length=None), "line 1: length is 'None', expected 0 or more"),
    "a negative length": (lambda d: edit_line(d, 0, length=-1), "line 1: length is '-1', expected 0 or more"),
    "no splits": (lambda d: edit_json(d / INFO, splits=...), None),
    "a split that ends too late": (lambda d: edit_json(d / INFO, splits={"train": "0:9"}), "0:9.*there are 3 episodes"),
    "the total": (lambda d: edit_json(d / INFO, total_episodes=5), "3 episodes, .*total_episodes 5"),
    "length": (lambda d: edit_line(d, 0, length=5), "episode 0: 6 rows, meta declares length 5"),
    "tasks of no type": (lambda d: edit_line(d, 0, tasks="push"), None),
    "other tasks": (lambda d: edit_line(d, 0, tasks=["sing"]), r"episode 0: its frames have .* meta has \['sing'\]"),
    "frame numbers": (lambda d: edit_table(d / V21_DATA, "frame_index", lambda v: [3 * n + 1 for n in v]), None),
    "no frame numbers": (lambda d: edit_table(d / V21_DATA, "frame_index", ...), None),
    "no episode numbers": (lambda d: edit_table(d / V21_DATA, "episode_index", ...), None),
    "frames numbered in words": (lambda d: edit_table(d / V21_DATA, "frame_index", numbered), None),
    "tasks numbered in words": (lambda d: edit_table(d / V21_DATA, "task_index", numbered), None),
    "no task numbers": (lambda d: edit_table(d / V21_DATA, "task_index", ...), None),
    "no time stamps": (lambda d: edit_table(d / V21_DATA, "timestamp", ...), None),
}
NEEDLESS_V30 = {
    "length": (lambda d: edit_table(d / V30_EPISODES, "length", lambda v: [5, *v[1:]]), "episode 0: 6 rows"),
    "rows": (lambda d: edit_table(d / V30_EPISODES, "dataset_from_index", lambda v: [0, 5, 99]), None),
    "no rows": (lambda d: edit_table(d / V30_EPISODES, "dataset_to_index", ...), None),
    "no tasks": (lambda d: edit_table(d / V30_EPISODES, "tasks", ...), None),
    "no texts of tasks": (lambda d: (d / "meta/tasks.parquet").unlink(), "tasks.parquet is missing; episodes with one"),
    "tasks of other columns": (lambda d: edit_table(d / "meta/tasks.parquet", "task", ...), "no columns .'__index"),
    "no lengths": (lambda d: edit_table(d / V30_EPISODES, "length", ...), "length is 'None', expected 0 or more"),
}


def same_content(source, episodes):
    assert list(source.instructions) == [episode.instruction for episode in episodes]
    for number, episode in enumerate(episodes):
        np.testing.assert_array_equal(source.actions(number), episode.actions)
        assert source.frame(SECOND, number, 5) == png_of(episode.images["wrist_image"][5])


@pytest.mark.parametrize(("version", "what"), [("v21", n) for n in NEEDLESS_V21] + [("v30", n) for n in NEEDLESS_V30])
def test_metadata_that_nobody_needs_change_nothing(version, what, episodes, tmp_path):
    folder = (write_lerobot_v21 if version == "v21" else write_lerobot_v30)(tmp_path / version, episodes)
    change, warning = (NEEDLESS_V21 if version == "v21" else NEEDLESS_V30)[what]
    change(folder)
    source = LeRobotSource(folder, LEROBOT_KEYS)
    same_content(source, episodes)
    assert (source.warnings == []) == (warning is None)
    assert all(re.search(warning, line) for line in source.warnings)


def test_what_a_video_needs_is_asked_for(tmp_path, episodes):
    """Its frames are found by the rate, and told from those of the next episode by the length."""
    folder = write_lerobot_v30(tmp_path, episodes, "video", LOSSLESS)
    edit_table(folder / V30_EPISODES, "length", numbered)
    open_fails(folder, "length is '6', expected 0 or more")
    edit_json(folder / INFO, fps="10")
    open_fails(folder, "info.json: fps is '10', expected a positive number")


@pytest.mark.parametrize("end", [lambda n: (n - 1) / FPS, lambda n: n / FPS + 1e-3, lambda n: None, lambda n: 9.0])
def test_the_end_of_an_episode_in_its_video_is_not_needed(tmp_path, episodes, end):
    folder = write_lerobot_v30(tmp_path, episodes, "video", LOSSLESS, per_file=1)
    edit_table(folder / V30_EPISODES, f"videos/{FIRST}/to_timestamp", lambda v: [end(len(e)) for e in episodes])
    source = LeRobotSource(folder, LEROBOT_KEYS)
    for number, episode in enumerate(episodes):
        for step in range(len(episode)):
            np.testing.assert_array_equal(source.frame(FIRST, number, step), decode_jpeg(episode.images["image"][step]))
    assert ["to 9.0 s, but it has" in line for line in source.warnings] == [True] * 3 * (end(1) == 9.0)


def test_width_before_height(tmp_path):
    """Many tools declare (W, H, 3); the pictures say what they are."""
    for images in ("png", "video"):
        episode = make_smooth_episode(0, 6, side=32)
        for camera, frames in episode.images.items():
            episode.images[camera] = [encode_jpeg(decode_jpeg(frame)[:16]) for frame in frames]
        folder = write_lerobot_v21(tmp_path / images, [episode], images, LOSSLESS)
        info = json.loads((folder / INFO).read_text())
        for key in (FIRST, SECOND):
            info["features"][key] |= {"shape": [32, 16, 3], "names": ["width", "height", "channels"]}
        edit_json(folder / INFO, features=info["features"])
        frame = LeRobotSource(folder, LEROBOT_KEYS).frame(FIRST, 0, 3)
        pixels = decode_image(frame) if isinstance(frame, bytes) else frame
        np.testing.assert_array_equal(pixels, decode_jpeg(episode.images["image"][3]))


def test_episodes_that_were_taken_out_by_hand(tmp_path, episodes):
    v21, v30 = (write(tmp_path / write.__name__, episodes) for write in (write_lerobot_v21, write_lerobot_v30))
    (v21 / V21_DATA).unlink()
    lines = (v21 / "meta/episodes.jsonl").read_text().splitlines()
    (v21 / "meta/episodes.jsonl").write_text("\n".join([lines[0], lines[2]]))
    table = pq.read_table(v30 / V30_EPISODES)
    pq.write_table(pa.concat_tables([table.slice(0, 1), table.slice(2)]), v30 / V30_EPISODES)
    for folder in (v21, v30):
        source = LeRobotSource(folder, LEROBOT_KEYS)
        same_content(source, [episodes[0], episodes[2]])
        assert "1 of the episodes up to 2 are not listed" in source.warnings[0]
        edit_json(folder / INFO, splits={"train": "0:2", "val": "2:3"})
        assert [len(LeRobotSource(folder, LEROBOT_KEYS, split)) for split in ("train", "val")] == [1, 1]


# One step, many shapes


def test_scalars_and_matrices_are_laid_flat(v21, episodes):
    for number in range(3):
        path = v21 / f"data/chunk-000/episode_{number:06d}.parquet"
        table = pq.read_table(path)
        length = table.num_rows
        pose = [[[float(10 * row + column) for column in range(3)] for row in range(2)]] * length
        table = table.append_column("pose", pa.array(pose)).append_column("grip", pa.array([0.5] * length))
        pq.write_table(table.append_column("flag", pa.array([True] * length)), path)
    info = json.loads((v21 / INFO).read_text())
    shapes = {"pose": [2, 3], "grip": [], "flag": [1]}
    info["features"] |= {key: {"dtype": "float32", "shape": shape} for key, shape in shapes.items()}
    edit_json(v21 / INFO, features=info["features"])
    source = LeRobotSource(v21, SourceKeys("lerobot", (FIRST,), tuple(shapes), "action"))
    np.testing.assert_array_equal(source.state(1), [[0, 1, 2, 10, 11, 12, 0.5, 1]] * 7)


def test_a_text_that_changes_is_that_of_its_steps(v21):
    edit_table(v21 / V21_DATA, "task_index", lambda values: [0, 0, 1, 1, 1, 0, 1])
    source = LeRobotSource(v21, LEROBOT_KEYS)
    plate, drawer = "push the plate", "open the drawer"
    assert [source.instruction_at(1, step) for step in range(7)] == [plate] * 2 + [drawer] * 3 + [plate, drawer]
    assert source.texts(1) == [plate, drawer] and source.instructions[1] == plate
    assert source.texts(0) == [plate] and source.instruction_at(2, 7) == plate


@pytest.mark.parametrize("values", [["sing"] * 3 + ["dance"] * 4, [1, 1, 1, 0, 0, 0, 0]])
def test_a_column_of_texts_or_of_task_numbers(v21, values):
    for number in range(3):
        path = v21 / f"data/chunk-000/episode_{number:06d}.parquet"
        table = pq.read_table(path)
        column = values if number == 1 else [values[0]] * table.num_rows
        pq.write_table(table.append_column("note", pa.array(column)), path)
    info = json.loads((v21 / INFO).read_text())
    edit_json(v21 / INFO, features=info["features"] | {"note": {"dtype": "string", "shape": [1]}})
    keys = replace(LEROBOT_KEYS, instruction="note")
    source = LeRobotSource(v21, keys)
    expected = ["sing", "dance"] if isinstance(values[0], str) else ["open the drawer", "push the plate"]
    assert source.texts(1) == expected and source.instruction_at(1, 3) == expected[1]
    tasks = v21 / "meta" / "tasks.jsonl"
    tasks.unlink()
    if isinstance(values[0], str):
        assert not any("tasks.jsonl" in line for line in LeRobotSource(v21, keys).warnings)
    else:  # the number of something else than the episode's task
        with pytest.raises(DataSetError, match="tasks.jsonl is missing"):
            LeRobotSource(v21, keys)


# Data files


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("action", lambda values: [None, *values[1:]], ": action: missing values"),
        ("action", lambda values: [[None] * 7, *values[1:]], ": action: missing values"),
        ("action", lambda values: [[1.0] * 6, *values[1:]], r"action: \[6, 7\] values per step, expected 7"),
        ("action", lambda values: ["a"] * 7, "action: string, expected numbers or lists of numbers"),
        ("action", lambda values: values[0], r"action: \[1\] values per step, expected 7"),
        ("episode_index", lambda values: [2] * 7, r"episode_index is \[2, 2, 2, 2, 2\]..., expected 1"),
        ("frame_index", lambda values: values[::-1], r"frame_index is \[6, 5, 4, 3, 2\]..., expected rising numbers"),
        ("task_index", lambda values: [0.5] * 7, "task_index is float64, expected integers"),
        ("task_index", lambda values: [9] * 7, "task_index 9 is not in the tasks of meta, found 2"),
        (FIRST, lambda values: [b"png"] * 7, r"image: binary, expected struct<bytes: binary"),
        (FIRST, lambda values: [{"path": "a.png"}] * 7, "expected struct<bytes: binary"),
        (FIRST, lambda values: [{"bytes": None, "path": "a"}, *values[1:]], "images without bytes"),
        (
            FIRST,
            lambda values: [{"bytes": b"GIF89a", "path": "a"}, *values[1:]],
            "step 0: .*not a complete JPEG or PNG",
        ),
        (FIRST, lambda values: [{"bytes": values[0]["bytes"][:60], "path": ""}, *values[1:]], "not a complete JPEG"),
    ],
)
def test_wrong_rows(v21, column, change, message):
    edit_table(v21 / V21_DATA, column, change)
    open_fails(v21, f"episode_000001.parquet: episode 1.*{message}")


@pytest.mark.parametrize("column", ["action", FIRST])
def test_missing_columns_are_listed(v21, column):
    edit_table(v21 / V21_DATA, column, ...)
    open_fails(v21, rf"episode_000001.parquet: no columns \['{column}'\], found \[", MissingFeatureError)


# Videos


@pytest.fixture
def video(tmp_path, episodes):
    return write_lerobot_v30(tmp_path / "video", episodes, "video", LOSSLESS)


VIDEO_FILE = f"videos/{FIRST}/chunk-000/file-000.mp4"


def images_of(*episodes):
    return [decode_jpeg(data) for episode in episodes for data in episode.images["image"]]


def test_too_short_video(video, episodes):
    write_video(video / VIDEO_FILE, images_of(*episodes[:2])[:-1], **LOSSLESS)
    open_fails(
        video, "file-000.mp4: episode 1: no frame for step 6 at 1.2000 s, found 12 frames from 0.0000 to 1.1000 s"
    )


def test_video_without_displayed_frames(video, monkeypatch):
    """Damaged edit lists can hide all frames."""
    monkeypatch.setattr(lerobot_video, "_packets", lambda *_: ([], [(0, 0)]))
    open_fails(video, "file-000.mp4: no frames that are displayed")


def test_video_of_another_size(video):
    write_video(video / VIDEO_FILE, [np.zeros((32, 16, 3), np.uint8)] * 13, **LOSSLESS)
    open_fails(video, r"file-000.mp4: frames of \(32, 16\), .* declares \(16, 16, 3\)")


def test_missing_and_damaged_videos(video):
    content = (video / VIDEO_FILE).read_bytes()
    for damaged in (b"", b"nothing", content[:500]):
        (video / VIDEO_FILE).write_bytes(damaged)
        open_fails(video, "file-000.mp4: cannot be read, expected a complete video")
    (video / VIDEO_FILE).unlink()
    open_fails(video, "file-000.mp4 is missing")


def test_play_lists_are_not_followed(video):
    (video / VIDEO_FILE).write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    open_fails(video, "file-000.mp4")


def test_video_damaged_after_opening(video):
    source = LeRobotSource(video, LEROBOT_KEYS)
    content = (video / VIDEO_FILE).read_bytes()
    (video / VIDEO_FILE).write_bytes(content[:300])
    with pytest.raises(DataSetError, match="file-000.mp4"):
        source.frame(FIRST, 0, 3)
    (video / VIDEO_FILE).write_bytes(content)
    assert source.frame(FIRST, 0, 3).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("from_timestamp", lambda values: [0.0, 0.3, 0.0], "of episode 0 .*but episode 1 begins at 0.3 s"),
        ("from_timestamp", lambda values: [float("nan"), 0.6, 0.0], "from nan s"),
        ("file_index", lambda values: [1, 0, 1], "of episode 0 .*but episode 2 begins at 0.0 s"),
        ("file_index", lambda values: [0, 0, 3], "file-003.mp4 is missing"),
    ],
)
def test_wrong_video_places(video, name, change, message):
    edit_table(video / V30_EPISODES, f"videos/{FIRST}/{name}", change)
    open_fails(video, message)


def test_time_stamps_that_do_not_match_the_video(video):
    edit_table(video / "data/chunk-000/file-001.parquet", "timestamp", lambda values: [0.0] * 8)
    open_fails(video, "no frame for step 1 at 0.0000 s")


def test_few_videos_stay_open_and_are_not_opened_per_frame(tmp_path, episodes, monkeypatch):
    folder = write_lerobot_v21(tmp_path, episodes, "video", LOSSLESS)
    source = LeRobotSource(folder, LEROBOT_KEYS)
    source._videos.limit = 2
    opened = []
    monkeypatch.setattr(
        lerobot_source, "VideoFile", lambda path, kind=lerobot_source.VideoFile: opened.append(path) or kind(path)
    )
    for step in range(6):
        source.frame(FIRST, 0, step)
        source.frame(SECOND, 0, step)
    assert len(opened) == 2
    source.frame(FIRST, 1, 0)
    assert len(opened) == 3 and len(source._videos) == 2


@pytest.mark.parametrize("codec", ["libsvtav1", "libx264"])
def test_subsampled_chroma_with_short_groups(tmp_path, codec):
    """The published data sets: AV1 or H.264 with 4:2:0 chroma and a keyframe every second frame."""
    import av

    if codec not in av.codecs_available:
        pytest.skip(f"PyAV without {codec}")
    episode = make_smooth_episode(0, 11, side=64)
    options = {"crf": "10", "g": "2"}
    folder = write_lerobot_v21(tmp_path, [episode], "video", {"codec": codec, "pix_fmt": "yuv420p", "options": options})
    source = LeRobotSource(folder, LEROBOT_KEYS)
    stored = np.stack(images_of(episode)).astype(int)
    for step in np.random.default_rng(0).permutation(11):
        distance = np.abs(source.frame(FIRST, 0, int(step)) - stored).mean(axis=(1, 2, 3))
        assert np.argmin(distance) == step and distance[step] < 3  # measured: at most 1.9, other steps above 4.4
    if hasattr(os, "sched_getscheduler"):
        assert os.sched_getscheduler(0) == os.SCHED_OTHER  # the encoder of AV1 takes real-time priority


# Memory


def test_rows_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    episode = make_smooth_episode(0, 40, side=16)
    folder = write_lerobot_v30(tmp_path, [episode], "png")
    sizes = []
    real = lerobot_index.embedded_images

    def counting(column, where):
        sizes.append(len(column))
        return real(column, where)

    monkeypatch.setattr(lerobot_index, "embedded_images", counting)
    source = LeRobotSource(folder, LEROBOT_KEYS)
    assert max(sizes) <= 32 and sum(sizes) == 80
    np.testing.assert_array_equal(decode_image(source.frame(FIRST, 0, 39)), decode_jpeg(episode.images["image"][39]))


def test_episodes_in_any_order_of_rows(tmp_path, episodes):
    """An episode that begins before the one read last: the file is read again from its start."""
    folder = write_lerobot_v30(tmp_path, episodes, "png", per_file=3)
    data = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(data)
    pq.write_table(pa.concat_tables([table.slice(6, 7), table.slice(0, 6), table.slice(13)]), data)
    edit_table(folder / V30_EPISODES, "dataset_from_index", lambda values: [7, 0, 13])
    edit_table(folder / V30_EPISODES, "dataset_to_index", lambda values: [13, 7, 21])
    source = LeRobotSource(folder, LEROBOT_KEYS)
    for number, episode in enumerate(episodes):
        np.testing.assert_array_equal(source.actions(number), episode.actions)
        assert source.frame(FIRST, number, 4) == png_of(episode.images["image"][4])
