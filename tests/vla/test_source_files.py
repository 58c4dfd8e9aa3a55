import os
import pickle

import numpy as np
import pytest

from prismatic.vla.datasets.source import DataSetError, SourceKeys
from prismatic.vla.datasets.source_files import OpenFiles, as_float32, decode_image, index_label, turn
from prismatic.vla.images import encode_jpeg


class Handle:
    def __init__(self, log, name):
        self.log, self.name = log, name
        log.append(f"open {name}")

    def close(self):
        self.log.append(f"close {self.name}")


def test_files_used_last_stay_open():
    log, files = [], OpenFiles(2)
    for name in "abacb":
        assert files.get(name, lambda name=name: Handle(log, name)).name == name
    assert log == ["open a", "open b", "open c", "close b", "open b", "close a"]
    files.drop("c")
    files.drop("unknown")
    assert log[-1] == "close c" and len(files) == 1


def test_copies_and_forks_begin_without_open_files(monkeypatch):
    log, files = [], OpenFiles(2)
    files.get("a", lambda: Handle(log, "a"))
    files_copy = pickle.loads(pickle.dumps(files))
    assert len(files_copy) == 0 and files_copy.limit == 2
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert len(files) == 0
    files.drop("a")
    files.get("a", lambda: Handle(log, "a again"))
    assert log == ["open a", "open a again"]  # the parent's handle is not closed by the child


def test_label_depends_on_split_and_keys():
    keys = [
        SourceKeys("hdf5", ("a",), ("s",), "x"),
        SourceKeys("hdf5", ("a", "b"), ("s",), "x"),
        SourceKeys("hdf5", ("a",), ("s", "t"), "x"),
        SourceKeys("hdf5", ("a",), ("s",), "y"),
    ]
    labels = [index_label(entry, "train") for entry in keys] + [index_label(keys[0], "../val")]
    assert len(set(labels)) == 5 and all(label.startswith("hdf5-") and "/" not in label for label in labels)
    turned = SourceKeys("hdf5", ("a",), ("s",), "x", rotated=True)
    assert index_label(turned, "train") == labels[0]  # what is stored is the same


def test_turn_by_180_degrees():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    assert turn(image)[0, 0].tolist() == image[-1, -1].tolist()
    assert turn(image).flags.c_contiguous
    np.testing.assert_array_equal(turn(turn(image)), image)


def test_decode_image():
    data = encode_jpeg(np.zeros((8, 6, 3), dtype=np.uint8))
    assert decode_image(data, "here").shape == (8, 6, 3)
    with pytest.raises(DataSetError, match="^here: not a complete JPEG or PNG"):
        decode_image(data[:40], "here")


def test_numbers_beyond_float32_become_infinite():
    assert as_float32(np.array([1e300, 1.5])).tolist() == [np.inf, 1.5]
