import json
import re
import subprocess
import sys

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

from prismatic.vla.datasets import lerobot_source
from prismatic.vla.datasets.lerobot_source import LeRobotSource
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError, SourceKeys
from prismatic.vla.datasets.source_files import decode_image
from prismatic.vla.images import decode_jpeg

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
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
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


@pytest.mark.parametrize("declared", ["0:4", "1:1", "all", 3, "-1:2", "0:99999999999999999999"])
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
        ({"codebase_version": "v2.0"}, "codebase_version is 'v2.0', expected v2.1 or v3.0"),
        ({"codebase_version": ...}, "codebase_version is None, expected str"),
        ({"fps": 0}, "fps is 0, expected a positive number"),
        ({"fps": 10**400}, "fps is 1000"),
        ({"fps": "10"}, "fps is '10', expected int or float"),
        ({"features": []}, r"features is \[\], expected dict"),
        ({"splits": ...}, "splits is None, expected dict"),
        ({"total_episodes": 5}, "3 episodes, meta/info.json declares total_episodes 5"),
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
        (FIRST, {"dtype": "image", "shape": [16, 17, 3]}, r"image \(16, 16, 3\), .* declares \(16, 17, 3\)"),
        (FIRST, {"dtype": "video", "shape": [16, 16, 3]}, "image/episode_000000.mp4 is missing"),
        ("action", {"dtype": "float32", "shape": [7, 1]}, r"shape \(7, 1\), expected one dimension"),
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


@pytest.mark.parametrize("name", [INFO, "meta/episodes.jsonl", "meta/tasks.jsonl", V21_DATA])
def test_missing_and_damaged_files_v21(v21, name):
    content = (v21 / name).read_bytes()
    (v21 / name).write_bytes(b"{" + content[: len(content) // 2])
    open_fails(v21, re.escape(name))
    (v21 / name).unlink()
    open_fails(v21, f"{re.escape(name)} is missing")


@pytest.mark.parametrize("name", [INFO, V30_EPISODES, "meta/tasks.parquet", "data/chunk-000/file-001.parquet"])
def test_missing_and_damaged_files_v30(v30, name):
    content = (v30 / name).read_bytes()
    (v30 / name).write_bytes(b"{" + content[: len(content) // 2])
    open_fails(v30, re.escape(name))
    (v30 / name).unlink()
    open_fails(v30, f"{re.escape(name)} is missing|meta/episodes holds no chunk")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"episode_index": 3, "length": 6}, r"episode_index \[1, 2, 3\], expected 0, 1, 2, ..."),
        ({"episode_index": 0, "length": 0}, "line 1: length is 0, expected a positive integer"),
        ({"episode_index": 0}, "line 1: length is None, expected int"),
        ({"episode_index": 0, "length": 5}, "episode_000000.parquet: 6 rows, meta/episodes.jsonl declares 5"),
        ({"episode_index": 0, "length": 6, "tasks": "push"}, "line 1: tasks is 'push', expected a list of texts"),
        ({"episode_index": 0, "length": 6, "tasks": ["sing"]}, r"task 'push the plate', the .* entry .* \['sing'\]"),
        ([], "line 1: list, expected a JSON object"),
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
        ("episode_index", lambda values: [7, *values[1:]], r"episode_index \[1, 2, 7\]"),
        ("length", lambda values: [5, *values[1:]], "dataset_from_index 0 to dataset_to_index 6, but length is 5"),
        ("dataset_from_index", lambda values: [0, 5, 13], "dataset_from_index 5 to dataset_to_index 13"),
        ("data/file_index", lambda values: [0, 0, 0], r"file-000.parquet: 13 rows, expected at least 21"),
        ("data/chunk_index", lambda values: [0, 0, 4], "chunk-004/file-001.parquet is missing"),
        ("tasks", lambda values: [["sing"], *values[1:]], r"\['sing'\]"),
        ("length", lambda values: [str(value) for value in values], "length is '6', expected int"),
    ],
)
def test_wrong_episode_table(v30, column, change, message):
    edit_table(v30 / V30_EPISODES, column, change)
    open_fails(v30, message)


def test_missing_columns_of_the_episode_table(v30):
    edit_table(v30 / V30_EPISODES, "dataset_from_index", ...)
    open_fails(v30, r"no columns \['dataset_from_index'\], found \['data/chunk_index'", MissingFeatureError)


def test_order_of_episode_lines_does_not_matter(v21):
    path = v21 / "meta" / "episodes.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert LeRobotSource(v21, LEROBOT_KEYS).lengths.tolist() == [6, 7, 8]


def test_task_that_is_not_unicode(v21):
    (v21 / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "\\ud800"}\n{"task_index": 1, "task": "b"}\n')
    edit_lines = [json.dumps({"episode_index": i, "length": 6 + i}) for i in range(3)]
    (v21 / "meta" / "episodes.jsonl").write_text("\n".join(edit_lines))
    open_fails(v21, "episode 0: .*surrogates not allowed")


# Data files


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("action", lambda values: [None, *values[1:]], ": action: missing values"),
        ("action", lambda values: [[None] * 7, *values[1:]], ": action: missing values"),
        ("action", lambda values: [[1.0] * 6, *values[1:]], r"action: \[6, 7\] values per step, expected 7"),
        ("action", lambda values: ["a"] * 7, "action: string, expected numbers or lists of numbers"),
        ("action", lambda values: values[0], r"action: \[1.0\] values per step, expected 7"),
        ("episode_index", lambda values: [2] * 7, r"episode_index is \[2, 2, 2, 2, 2\]..., expected 1"),
        ("frame_index", lambda values: values[::-1], r"frame_index is \[6, 5, 4, 3, 2\]..., expected 0 to 6"),
        ("task_index", lambda values: [0, *values[1:]], r"task_index changes within the episode: \[0, 1\]"),
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


@pytest.mark.parametrize("column", ["action", "task_index", FIRST])
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
    monkeypatch.setattr(lerobot_source, "_packets", lambda *_: ([], [(0, 0)]))
    open_fails(video, "file-000.mp4: no frames that are displayed")


def test_video_of_another_size(video):
    write_video(video / VIDEO_FILE, [np.zeros((32, 16, 3), np.uint8)] * 13, **LOSSLESS)
    source = LeRobotSource(video, LEROBOT_KEYS)
    with pytest.raises(DataSetError, match=r"file-000.mp4: frame \(32, 16, 3\), .* declares \(16, 16, 3\)"):
        source.frame(FIRST, 0, 0)
    assert source.frame(SECOND, 0, 0).shape == (16, 16, 3)


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
        ("from_timestamp", lambda values: [0.0, 0.3, 0.0], "from 0.3 s to 1.3 s, expected 7 steps at 10.0 fps"),
        ("from_timestamp", lambda values: [float("nan"), 0.6, 0.0], "from nan s"),
        ("file_index", lambda values: [1, 0, 1], ""),
        ("file_index", lambda values: [0, 0, 3], "file-003.mp4 is missing"),
    ],
)
def test_wrong_video_places(video, name, change, message):
    edit_table(video / V30_EPISODES, f"videos/{FIRST}/{name}", change)
    if message:
        open_fails(video, message)
    else:  # another file that is long enough cannot be told from the right one
        assert len(LeRobotSource(video, LEROBOT_KEYS)) == 3


def test_time_stamps_that_do_not_match_the_video(video):
    edit_table(video / "data/chunk-000/file-001.parquet", "timestamp", lambda values: [0.0] * 8)
    open_fails(video, "no frame for step 1 at 0.0000 s")


def test_few_videos_stay_open_and_are_not_opened_per_frame(tmp_path, episodes, monkeypatch):
    folder = write_lerobot_v21(tmp_path, episodes, "video", LOSSLESS)
    source = LeRobotSource(folder, LEROBOT_KEYS)
    source._videos.limit = 2
    opened = []
    monkeypatch.setattr(
        lerobot_source, "_VideoFile", lambda path, kind=lerobot_source._VideoFile: opened.append(path) or kind(path)
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


# Memory


def test_rows_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    episode = make_smooth_episode(0, 40, side=16)
    folder = write_lerobot_v30(tmp_path, [episode], "png")
    sizes = []
    real = lerobot_source._embedded_images

    def counting(column, where):
        sizes.append(len(column))
        return real(column, where)

    monkeypatch.setattr(lerobot_source, "_embedded_images", counting)
    source = LeRobotSource(folder, LEROBOT_KEYS)
    assert max(sizes) <= 32 and sum(sizes) == 80
    np.testing.assert_array_equal(
        decode_image(source.frame(FIRST, 0, 39), "here"), decode_jpeg(episode.images["image"][39])
    )


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
