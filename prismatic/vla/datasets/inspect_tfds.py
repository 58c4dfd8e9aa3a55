"""Reads an RLDS data set a second time, with tensorflow-datasets, and lists what differs from this package's reader."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.progress import over
from prismatic.vla.datasets.rlds import RLDSReader
from prismatic.vla.datasets.rlds_features import FeatureSpec
from prismatic.vla.images import decode_image

_MAX_LISTED = 50


def import_tfds() -> Any:
    """The module `tensorflow_datasets`; ImportError that names the extra when it is not installed."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            f"--backend tfds needs tensorflow-datasets and tensorflow ({error}): pip install 'craft-vla[tfds]'. "
            "TensorFlow and MuJoCo do not work in one process: use a separate environment"
        ) from error
    return tensorflow_datasets


def compare_with_tfds(directory: str | os.PathLike, split: str = "train") -> dict:
    """Read a version directory with both readers.

    Numbers, texts and encoded image bytes are compared exactly. Pixels are not counted as differences, because the two
    JPEG decoders round differently: the largest difference is reported.

    Returns:
        {episodes, values, images, count, differences: [{episode, feature, tfds, ours}] (the first 50),
        largest_pixel_difference}.
    """
    tfds = import_tfds()
    reader = RLDSReader(Path(directory), split)
    builder = tfds.builder_from_directory(str(directory))
    comparison = _Comparison(reader, _image_decoder(builder, reader))
    theirs = iter(_episodes(tfds, builder, reader, split))
    for number in over(range(len(reader)), "comparing", "episodes"):
        episode = next(theirs, None)
        if episode is None:
            comparison.differ(number, "episodes", number, len(reader))
            break
        comparison.episode(number, episode)
    extra = sum(1 for _ in theirs)
    if extra:
        comparison.differ(len(reader), "episodes", len(reader) + extra, len(reader))
    return comparison.result


def _episodes(tfds: Any, builder: Any, reader: RLDSReader, split: str) -> Iterable[dict]:
    cameras = {key: tfds.decode.SkipDecoding() for key in reader.camera_keys}
    data_set = builder.as_dataset(
        split=split,
        decoders={"steps": {"observation": cameras}},
        # One shard after another: tfds otherwise interleaves up to 16, and episodes would not be in file order.
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        shuffle_files=False,
    )
    return tfds.as_numpy(data_set)


def _image_decoder(builder: Any, reader: RLDSReader):
    cameras = {key: builder.info.features["steps"]["observation"][key] for key in reader.camera_keys}
    return lambda camera, data: np.asarray(cameras[camera].decode_example(data))


class _Comparison:
    """Counts what agrees and lists what does not."""

    def __init__(self, reader: RLDSReader, decode) -> None:
        self.reader, self.decode = reader, decode
        self.result: dict[str, Any] = {
            "episodes": 0,
            "values": 0,
            "images": 0,
            "count": 0,
            "differences": [],
            "largest_pixel_difference": 0,
        }

    def differ(self, episode: int, feature: str, tfds: object, ours: object) -> None:
        """Note one difference."""
        self.result["count"] += 1
        if len(self.result["differences"]) < _MAX_LISTED:
            entry = {"episode": episode, "feature": feature, "tfds": str(tfds), "ours": str(ours)}
            self.result["differences"].append(entry)

    def episode(self, number: int, theirs: dict) -> None:
        """Compare one episode as tfds gives it: nested features, `steps` an iterable of nested features."""
        record = self.reader.record(number)
        values = record.values()
        length = len(self.reader.instruction(values, record.where))
        steps = list(theirs["steps"])
        self.result["episodes"] += 1
        if len(steps) != length:
            self.differ(number, "steps", len(steps), length)
            return
        for name, spec in self.reader.features.items():
            if spec.kind == "other" or -1 in spec.shape and spec.kind == "tensor":
                continue  # not read here
            if not spec.per_step:
                self._text(number, name, [_lookup(theirs, name)], values.get(name, []))
                continue
            column = [_lookup(step, name.removeprefix("steps/")) for step in steps]
            if spec.kind == "tensor" and spec.dtype != "string":
                self._numbers(number, spec, column, self.reader.numbers(values, name, length, record.where))
            elif spec.kind == "image":
                self._images(number, name, column, values[name])
            else:
                self._text(number, name, column, values[name])

    def _numbers(self, episode: int, spec: FeatureSpec, theirs: list, ours: np.ndarray) -> None:
        stacked = np.stack(theirs)
        self.result["values"] += stacked.size
        if stacked.shape != ours.shape or stacked.dtype != ours.dtype:
            found = (f"{array.dtype} {array.shape}" for array in (stacked, ours))
            self.differ(episode, spec.name, *found)
            return
        wrong = np.argwhere(~((stacked == ours) | ((stacked != stacked) & (ours != ours))))
        if wrong.size:
            place = tuple(wrong[0].tolist())
            found = (f"{array[place]!r} at {place} and {len(wrong) - 1} more places" for array in (stacked, ours))
            self.differ(episode, spec.name, *found)

    def _text(self, episode: int, name: str, theirs: list, ours) -> None:
        theirs, ours = [_plain(value) for value in theirs], [_plain(value) for value in ours]
        self.result["values"] += len(theirs)
        if theirs != ours:
            step = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), -1)
            self.differ(episode, name, *(f"{values[step:][:1]} at step {step}" for values in (theirs, ours)))

    def _images(self, episode: int, name: str, theirs: list[bytes], ours: list[bytes] | np.ndarray) -> None:
        camera = name.rsplit("/", 1)[-1]
        for step, (their, our) in enumerate(zip(theirs, ours, strict=True)):
            self.result["images"] += 1
            if their != our:
                self.differ(episode, name, *(f"{len(data)} bytes at step {step}" for data in (their, our)))
                continue
            pixels = self.decode(camera, our).astype(np.int16), decode_image(our).astype(np.int16)
            if pixels[0].shape != pixels[1].shape:
                self.differ(episode, name, *(f"{image.shape} at step {step}" for image in pixels))
                continue
            largest = int(np.abs(pixels[0] - pixels[1]).max())
            self.result["largest_pixel_difference"] = max(largest, self.result["largest_pixel_difference"])


def _lookup(tree: Any, name: str) -> Any:
    for part in name.split("/"):
        tree = tree[part]
    return tree


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic | np.ndarray) and np.ndim(value) == 0 else value
