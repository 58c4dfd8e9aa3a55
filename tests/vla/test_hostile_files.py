"""Files made to harm: special ones, links that lead out, small ones that blow up; and what a killed process leaves."""

import fcntl
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import ends, write_data_set
from format_writers import LEROBOT_KEYS, LOSSLESS, make_smooth_episode, write_hdf5, write_lerobot_v21, write_lerobot_v30
from PIL import Image

from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets import hdf5_source, index_writer, lerobot_index, lerobot_tables
from prismatic.vla.datasets.example_proto import build_example, parse_example
from prismatic.vla.datasets.formats import open_source
from prismatic.vla.datasets.registry import get_data_set_config
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError, SourceKeys
from prismatic.vla.datasets.source_files import regular_file
from prismatic.vla.images import MAX_PIXELS, decode_image, image_size
from prismatic.vla.normalization import Normalizer, StatisticsError, compute_statistics, load_statistics

RLDS_KEYS, *_, HDF5_KEYS = get_data_set_config("libero_").keys
KEYS = {"rlds": RLDS_KEYS, "v21": LEROBOT_KEYS, "v30": LEROBOT_KEYS, "hdf5": HDF5_KEYS}
ALLOWED = (DataSetError, MissingFeatureError, FileNotFoundError)


def write(root, kind):
    episodes = [make_smooth_episode(i, 3, side=16) for i in range(2)]
    if kind == "rlds":
        return write_data_set(root, "libero_set", episodes)
    if kind == "hdf5":
        return write_hdf5(root / "libero_set", episodes)
    writer = write_lerobot_v21 if kind == "v21" else write_lerobot_v30
    return writer(root / "libero_set", episodes, "video", LOSSLESS)


def read(kind, folder, skip_bad=False):
    with ends():
        source = open_source(folder, KEYS[kind], None, skip_bad)
        for episode, length in enumerate(source.lengths):
            for camera in source.keys.cameras if length else ():
                source.frame(camera, episode, int(length) - 1)
    return source


# Special files and links

REPLACEMENTS = {
    "a pipe": lambda path, outside: os.mkfifo(path),
    "a device": lambda path, outside: path.symlink_to("/dev/zero"),
    "a loop": lambda path, outside: path.symlink_to(path),
    "a folder": lambda path, outside: path.mkdir(),
    "a link to nothing": lambda path, outside: path.symlink_to(outside / "absent"),
    "a link that leads out": lambda path, outside: path.symlink_to(outside / "file"),
}
FILES = {
    "rlds": ["features.json", "dataset_info.json", "libero_set-train.tfrecord-00000-of-00001"],
    "v21": ["meta/info.json", "meta/episodes.jsonl", "meta/tasks.jsonl", "data/chunk-000/episode_000001.parquet",
            "videos/chunk-000/observation.images.image/episode_000001.mp4"],
    "v30": ["meta/info.json", "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet",
            "data/chunk-000/file-000.parquet", "videos/observation.images.image/chunk-000/file-000.mp4"],
    "hdf5": ["push_the_plate_demo.hdf5"],
}  # fmt: skip


@pytest.mark.parametrize("what", REPLACEMENTS)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_what_is_no_file_of_the_data_set_is_not_read(tmp_path, kind, name, what):
    folder = write(tmp_path, kind)
    (tmp_path / "outside").mkdir()
    shutil.copy(folder / name, tmp_path / "outside" / "file")
    (folder / name).unlink()
    REPLACEMENTS[what](folder / name, tmp_path / "outside")
    if "tasks" in name:  # the episodes name their own
        assert any(name in line for line in read(kind, folder).warnings)
        return
    with pytest.raises(ALLOWED, match=name.rpartition("/")[2]):
        read(kind, folder)
    try:
        source = read(kind, folder, skip_bad=True)
    except ALLOWED as error:
        assert name.rpartition("/")[2] in str(error)
    else:
        assert any(name in text for text in [*source.problems.values(), *source.problems])


@pytest.mark.parametrize("kind", FILES)
def test_links_inside_and_the_cache_of_the_hub_are_followed(tmp_path, kind):
    """The hub keeps `snapshots/<revision>` as links into `blobs` beside it."""
    repo = tmp_path / "datasets--someone--some"
    folder = write(repo / "snapshots" / "0f1e", kind)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = repo / "blobs" / str(number)
        shutil.move(path, blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    assert len(read(kind, folder)) == 2
    linked = tmp_path / "link"
    linked.symlink_to(folder)
    assert len(read(kind, linked)) == 2


def test_a_file_has_to_be_inside(tmp_path):
    (tmp_path / "set" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for path in ("set/inner/../../file", "set/../file"):
        with pytest.raises(DataSetError, match=r"leads to .*file, expected a file inside .*set"):
            regular_file(tmp_path / path, tmp_path / "set")


@pytest.mark.parametrize("kind", ["hdf5"])
@pytest.mark.parametrize("how", ["external link", "external storage", "virtual"])
def test_hdf5_data_of_other_files_are_not_read(tmp_path, kind, how):
    folder = write(tmp_path, kind)
    secret = tmp_path / "secret"
    with h5py.File(secret, "w") as file:
        file["actions"] = np.ones((3, 7))
    with h5py.File(folder / FILES[kind][0], "r+") as file:
        demo = file["data/demo_1"]
        del demo["actions"]
        if how == "external link":
            demo["actions"] = h5py.ExternalLink(str(secret), "actions")
        elif how == "external storage":
            demo.create_dataset("actions", (3, 7), "f8", external=[(str(secret), 0, 3 * 7 * 8)])
        else:
            layout = h5py.VirtualLayout((3, 7), "f8")
            layout[:] = h5py.VirtualSource(str(secret), "actions", (3, 7))
            demo.create_virtual_dataset("actions", layout)
    with pytest.raises(DataSetError, match="data/demo_1/actions.*another file"):
        read(kind, folder)


def test_an_index_of_special_files_is_built_again(tmp_path):
    folder = write(tmp_path, "v21")
    first = read("v21", folder)
    for path in list(first._index.folder.iterdir()):
        path.unlink()
        os.mkfifo(path)
        assert read("v21", folder).fingerprint == first.fingerprint


# Small files that blow up


def png(width, height, mode=b"\x08\x02"):
    """A picture of one colour, whose rows compress a thousand times."""

    def chunk(name, data):
        body = name + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + mode + b"\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@contextmanager
def little_memory(room=256 << 20):
    """An address space that a wild allocation does not fit in."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_an_image_of_many_pixels_is_not_decoded():
    bomb = png(8192, 8192)
    assert len(bomb) < 1 << 20
    with little_memory(64 << 20):
        for look in (decode_image, image_size):
            with pytest.raises(ValueError, match=f"8192x8192 pixels, expected at most {MAX_PIXELS}"):
                look(bomb)


def test_a_declared_size_is_enforced_before_decoding(tmp_path):
    folder = write(tmp_path, "rlds")
    (shard,) = folder.glob("*tfrecord*")
    from prismatic.vla.datasets.tfrecord import iter_records, write_records

    records = [parse_example(payload) for payload in iter_records(shard)]
    records[1]["steps/observation/wrist_image"][2] = png(4000, 4000)
    write_records(shard, [build_example(record) for record in records])
    with (
        little_memory(),
        pytest.raises(DataSetError, match=r"step 2: image \(4000, 4000, 3\), but declared"),
    ):
        read("rlds", folder)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "1"])
def test_images_that_are_not_rgb_are_refused_by_their_header(mode):
    stream = io.BytesIO()
    Image.new(mode, (5, 4)).save(stream, "PNG")
    for look in (decode_image, image_size):
        with pytest.raises(ValueError, match=r"has shape \(4, 5\) and mode .*, expected \(H, W, 3\)"):
            look(stream.getvalue())


def hdf5_with(folder, key, shape, dtype, chunks, written):
    """One chunk on disk, the rest is what the library fills in."""
    with h5py.File(folder / FILES["hdf5"][0], "r+") as file:
        demo = file["data/demo_1"]
        if key in demo:
            del demo[key]
        made = demo.create_dataset(key, shape, dtype, chunks=chunks, compression="gzip")
        made[written] = 1
    assert (folder / FILES["hdf5"][0]).stat().st_size < 1 << 20


@pytest.mark.parametrize(
    ("key", "shape", "dtype", "chunks", "message"),
    [
        ("actions", (10**12, 7), "f8", (10, 7), "expected at most 1048576 steps"),
        ("actions", (10**6, 10**6), "f8", (10, 7), "expected at most 1048576 steps and 67108864 numbers"),
        ("obs/agentview_rgb", (3, 10**5, 10**5, 3), "u1", (1, 8, 8, 3), "images of 10000000000 pixels"),
        ("actions", (3, 7 * 10**7), "f8", (1, 7 * 10**7), "chunks of 560000000 bytes"),
    ],
)
def test_hdf5_arrays_that_are_larger_than_their_files(tmp_path, key, shape, dtype, chunks, message):
    folder = write(tmp_path, "hdf5")
    if "chunks of" in message:  # not written: compressing it takes the memory that reading must not take
        with h5py.File(folder / FILES["hdf5"][0], "r+") as file:
            del file[f"data/demo_1/{key}"]
            made = file["data/demo_1"].create_dataset(key, shape, dtype, chunks=chunks, compression="gzip")
            made.id.write_direct_chunk((0, 0), zlib.compress(b"\0" * 1000))
    else:
        hdf5_with(folder, key, shape, dtype, chunks, (0,) * len(shape))
    with little_memory(), pytest.raises(DataSetError, match=message):
        read("hdf5", folder)
    with little_memory():
        assert read("hdf5", folder, skip_bad=True).lengths.tolist() == [3, 0]


def test_an_hdf5_mask_that_is_larger_than_its_file(tmp_path):
    folder = write(tmp_path, "hdf5")
    for name in ("train", "few"):
        with h5py.File(folder / FILES["hdf5"][0], "r+") as file:
            made = file.create_dataset(f"mask/{name}", (10**11,), "S10", chunks=(100,), compression="gzip")
            made[0] = b"demo_0"
    with little_memory():
        assert "mask/train: |S10" in read("hdf5", folder).warnings[0]
    with little_memory(), pytest.raises(DataSetError, match="mask/few.*expected names of demonstrations"):
        open_source(folder, KEYS["hdf5"], "few")


def replace_column(path, name, column, **options):
    table = pq.read_table(path)
    place = table.column_names.index(name)
    pq.write_table(table.set_column(place, name, column), path, **options)


def test_a_parquet_row_with_millions_of_values(tmp_path):
    folder = write(tmp_path, "v21")
    path = folder / FILES["v21"][3]
    values = pa.repeat(pa.scalar(0.0, pa.float32()), 12_000_000)
    offsets = pa.array([0, 7, 14, 12_000_000], pa.int32())
    replace_column(path, "action", pa.ListArray.from_arrays(offsets, values), compression="zstd")
    assert path.stat().st_size < 1 << 20
    with (
        little_memory(32 << 20),
        pytest.raises(DataSetError, match="12000000 values in 3 rows, expected 7 per row"),
    ):
        read("v21", folder)


def test_parquet_pages_that_blow_up(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_tables, "_MOST_COLUMN_BYTES", 1 << 20)
    episodes = [make_smooth_episode(i, 3, side=16) for i in range(2)]
    folder = write_lerobot_v21(tmp_path / "libero_set", episodes)
    path = folder / FILES["v21"][3]
    images = pa.array([{"bytes": bytes(1 << 22), "path": str(i)} for i in range(3)])
    replace_column(path, "observation.images.image", images, compression="zstd", use_dictionary=False)
    with pytest.raises(DataSetError, match=r"image.bytes has \d+ bytes compressed to \d+, expected at most 500 times"):
        read("v21", folder)
    assert read("v21", folder, skip_bad=True).lengths.tolist() == [3, 0]


def test_parquet_rows_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_index, "MAX_STEPS", 1000)
    monkeypatch.setattr(lerobot_tables, "_MOST_EPISODES", 1000)
    v21, v30 = write(tmp_path / "a", "v21"), write(tmp_path / "b", "v30")
    for path in (v21 / FILES["v21"][3], v30 / FILES["v30"][1], v30 / FILES["v30"][2]):
        table, whole = pq.read_table(path), path.read_bytes()
        pq.write_table(pa.concat_tables([table.slice(0, 1)] * 2000), path)
        kind, folder = ("v21", v21) if "episode_" in path.name else ("v30", v30)
        words = f"{path.name}.*2000 rows, expected at most 1000"
        if "tasks" in path.name:
            assert re.search(words, read(kind, folder).warnings[0])
            continue
        with pytest.raises(DataSetError, match=words):
            read(kind, folder)
        path.write_bytes(whole)


def test_metadata_texts_that_blow_up(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_tables, "_MOST_TABLE_BYTES", 1 << 20)
    folder = write(tmp_path, "v30")
    path = folder / FILES["v30"][2]
    pq.write_table(pa.table({"task_index": range(40), "task": ["x" * 100_000] * 40}), path)
    assert path.stat().st_size < 200_000
    assert "tasks.parquet: more than 1048576 bytes" in read("v30", folder).warnings[0]


def test_the_index_does_not_fill_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(index_writer, "_ALWAYS_ALLOWED", 1000)
    monkeypatch.setattr(index_writer, "_ALLOWED_RATIO", 2)
    folder = write(tmp_path, "hdf5")
    assert len(read("hdf5", folder)) == 2
    shutil.rmtree(folder / ".craft_index")
    hdf5_with(folder, "actions", (3, 10**5), "f8", (3, 1000), (0, 0))
    keys = SourceKeys("hdf5", HDF5_KEYS.cameras, ("actions",), None, rotated=True)
    with h5py.File(folder / FILES["hdf5"][0], "r+") as file:
        del file["data/demo_0"]
    with pytest.raises(DataSetError, match="more than 2 times the size of its files"):
        hdf5_source.HDF5Source(folder, keys)


def test_numbers_of_a_record_that_nobody_reads_are_not_unpacked(tmp_path):
    payload = build_example({"a": np.arange(3), "b": np.zeros(10, np.float32), "c": [b"x"]})
    assert list(parse_example(payload, ["c", "a", "absent"])) == ["c", "a"]


# What a killed process leaves

KILLED = """
import os, signal, sys
from pathlib import Path
from prismatic.vla.datasets.index import open_index
def build(writer):
    (writer.folder / "half").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
open_index(folder, "train", [], build)
"""


def leftovers(folder):
    return sorted(path.name for path in (folder / ".craft_index").iterdir() if path.name.startswith("."))


def test_what_a_kill_left_is_removed_at_the_next_opening(tmp_path):
    folder = write(tmp_path, "rlds")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    assert killed.returncode == -signal.SIGKILL and len(leftovers(folder)) == 1
    read("rlds", folder)
    assert leftovers(folder) == []


def test_what_another_process_is_building_stays(tmp_path):
    folder = write(tmp_path, "rlds")
    busy, new, old = (folder / ".craft_index" / f".train.{number}.tmp" for number in range(3))
    for path in (busy, new, old):
        path.mkdir(parents=True)
    os.utime(old, (time.time() - 7200,) * 2)
    with (busy / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(busy, (0, 0))
        read("rlds", folder)
        assert leftovers(folder) == [busy.name, new.name]
    read("rlds", folder)
    assert leftovers(folder) == [new.name]


def test_what_is_left_is_not_followed_out(tmp_path):
    folder = write(tmp_path, "rlds")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("")
    (folder / ".craft_index").mkdir()
    (folder / ".craft_index" / ".train.1.tmp").symlink_to(tmp_path / "precious")
    read("rlds", folder)
    assert (tmp_path / "precious" / "file").is_file()


# Statistics are data


def statistics_with(**changes):
    rng = np.random.default_rng(0)
    made = json.loads(json.dumps(compute_statistics([rng.normal(size=(9, 7))], [rng.normal(size=(9, 8))], [True] * 7)))
    made["action"] |= changes
    return made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q99": [1.0] * 6 + [1e308]}, "expected an action scale: at most 1e"),
        ({"max": [1e30] * 7}, "expected an action scale"),
        ({"std": [-0.1] + [1.0] * 6}, "std is .* expected 0 or more"),
        ({"mean": [0.0] * 9}, "expected 7 numbers"),
        ({"mean": [float("nan")] * 7}, "not finite"),
    ],
)
def test_statistics_that_are_no_scale(changes, message):
    with pytest.raises(StatisticsError, match=f"action.*{message}"):
        Normalizer(statistics_with(**changes), ActionSpec())


def test_scales_of_any_unit_are_accepted():
    for unit in (1e-6, 1.0, 4096.0, 2e9):
        values = statistics_with()["action"]
        scaled = {
            name: [unit * value for value in values[name]] for name in ("mean", "std", "min", "max", "q01", "q99")
        }
        normalizer = Normalizer(statistics_with(**scaled), ActionSpec())
        assert np.isfinite(normalizer.normalize_action(np.full((2, 7), unit, np.float32))).all()


@pytest.mark.parametrize("what", ["a pipe", "a device", "a folder"])
def test_statistics_in_a_special_file(tmp_path, what):
    REPLACEMENTS[what](tmp_path / "dataset_statistics.json", tmp_path)
    with ends(), pytest.raises(StatisticsError, match="dataset_statistics.json: found .*, expected a file"):
        load_statistics(tmp_path / "dataset_statistics.json")


@pytest.mark.parametrize("name", ["chunk_len", "action_dim", "proprio_dim"])
def test_sizes_that_no_robot_has(name):
    with pytest.raises(ValueError, match=f"{name} is 1000000000, expected a positive integer up to"):
        ActionSpec.from_dict(ActionSpec().to_dict() | {name: 10**9})
