"""Robot episodes in the tensorflow_datasets RLDS layout, read and written without TensorFlow.

Layout: `<root>/<folder>/<version>/{features.json, dataset_info.json, <name>-<split>.tfrecord-NNNNN-of-MMMMM}`, one
`tf.train.Example` per episode with flat keys `steps/...`. `<name>` may differ from `<folder>`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prismatic.evidence.checks import FOREIGN, check_collection, read_object
from prismatic.evidence.files import temporary_beside, write_json
from prismatic.vla.datasets.example_proto import build_example
from prismatic.vla.datasets.rlds_features import FeatureSpec, libero_features, read_features
from prismatic.vla.datasets.rlds_record import EpisodeRecord, flat_name, get, step_array, text
from prismatic.vla.datasets.rlds_shards import DEFAULT_TEMPLATE, dataset_info, shard_name, write_shards
from prismatic.vla.datasets.rlds_versions import VERSION
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError
from prismatic.vla.datasets.source_files import choose_split, regular_file
from prismatic.vla.datasets.tfrecord import CorruptRecordError, RecordSpan, iter_spans, read_record, write_records

METADATA_FILE = "craft_metadata.json"
_IMAGE_PREFIX = "steps/observation/"
_ACTION, _STATE, _JOINTS = "steps/action", "steps/observation/state", "steps/observation/joint_state"
_INSTRUCTION, _FILE_PATH = "steps/language_instruction", "episode_metadata/file_path"
_OTHER_INSTRUCTION = "steps/observation/natural_language_instruction"  # of many Open X-Embodiment data sets
_HINT = "--skip_bad_episodes True reads the others"
_REQUIRED = (_ACTION, _STATE, _INSTRUCTION)


@dataclass(eq=False)
class Episode:
    """One demonstration of T steps, as stored (no standardisation, no normalisation).

    instruction: that of the first step. actions (T, A) float32, gripper -1 = open, +1 = close for LIBERO. state (T, S)
    float32. joint_state (T, J) float32 or None. images: {camera key: T JPEG strings}, LIBERO cameras `image` and
    `wrist_image`, already rotated upright. reward, discount (T,) float32 and is_first, is_last, is_terminal (T,) bool;
    the writer fills missing ones with reward 1 on the last step, discount 1 and the first/last flags. file_path: source
    of the episode, free text.
    """

    index: int
    instruction: str
    actions: np.ndarray
    state: np.ndarray
    images: dict[str, list[bytes]]
    joint_state: np.ndarray | None = None
    file_path: str = ""
    reward: np.ndarray | None = None
    discount: np.ndarray | None = None
    is_first: np.ndarray | None = None
    is_last: np.ndarray | None = None
    is_terminal: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.actions)


class RLDSReader:
    """Random access to the episodes of one split of a version directory.

    Opening reads the two JSON files and the record headers: a missing shard raises FileNotFoundError, a truncated one
    CorruptRecordError, fewer records than declared DataSetError, a missing split DataSetError, an undeclared feature
    among `required` MissingFeatureError; each names the file. Payload checksums are checked on reading.

    split: None is `train`, or the only one. skip_bad: shards that are missing or end early are named in `problems`,
    {file name: error}, instead of raised, and the records before the damage are there.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        split: str | None = None,
        required: Sequence[str] = _REQUIRED,
        skip_bad: bool = False,
    ):
        self.directory = Path(directory)
        self.problems: dict[str, Exception] = {}
        self._skip_bad = skip_bad
        for file_name in ("features.json", "dataset_info.json"):
            if not (self.directory / file_name).is_file():
                raise FileNotFoundError(f"{self.directory / file_name} is missing or no regular file")
            regular_file(self.directory / file_name, self.directory)
        self.features_path = self.directory / "features.json"
        self.features = read_features(self.features_path)
        for name in required:
            self.require(name)
        self.split, self.name, self.shard_lengths, self.shard_paths = self._shards(split)
        self._records = self._index()

    @property
    def num_episodes(self) -> int:
        """Number of episodes of the split."""
        return len(self._records)

    @property
    def camera_keys(self) -> tuple[str, ...]:
        """Declared image observations, e.g. ('image', 'wrist_image')."""
        return tuple(
            name.removeprefix(_IMAGE_PREFIX)
            for name, spec in self.features.items()
            if spec.kind == "image" and name.startswith(_IMAGE_PREFIX)
        )

    @property
    def metadata(self) -> dict | None:
        """Content of `craft_metadata.json` (how the data were collected), None when there is none.

        Raises DataSetError when it is no JSON object, or an entry is of another type.
        """
        path = self.directory / METADATA_FILE
        if not path.is_file():
            return None
        try:
            regular_file(path, self.directory)
            content = read_object(path)
            check_collection(content, str(path))
        except ValueError as error:
            raise DataSetError(str(error)) from None
        return content

    def require(self, name: str) -> FeatureSpec:
        """Declaration of feature `name`; MissingFeatureError with the declared names otherwise."""
        if name not in self.features:
            raise MissingFeatureError(f"{self.features_path}: no feature {name!r}, found {sorted(self.features)}")
        return self.features[name]

    def require_camera(self, key: str) -> FeatureSpec:
        """Declaration of image observation `key`; MissingFeatureError otherwise."""
        return self.require(f"{_IMAGE_PREFIX}{key}")

    def episode(self, index: int) -> Episode:
        """Episode `index` in file order (0 <= index < num_episodes)."""
        record = self.record(index)
        return self._build_episode(index, record.values(), record.where)

    def record(self, index: int) -> EpisodeRecord:
        """The bytes of episode `index`, checked."""
        if not 0 <= index < self.num_episodes:
            raise IndexError(f"episode {index} of {self.directory}: expected 0 <= index < {self.num_episodes}")
        path, span = self._records[index]
        where = f"{path}: record {span.number} at offset {span.offset}"
        return EpisodeRecord(self.shard_paths.index(path), span.offset, read_record(path, span), where)

    def __iter__(self) -> Iterator[Episode]:
        return (self.episode(index) for index in range(self.num_episodes))

    def __len__(self) -> int:
        return self.num_episodes

    def _shards(self, split: str | None) -> tuple[str, str, list[int], list[Path]]:
        path = self.directory / "dataset_info.json"
        try:
            info = read_object(path, finite=False, limits=FOREIGN)
            name, splits = info["name"], {entry["name"]: entry for entry in info["splits"]}
            split = choose_split(split, list(splits), path)
            lengths = [int(length) for length in splits[split]["shardLengths"]]
            kind = info.get("fileFormat", "tfrecord")
        except DataSetError:
            raise
        except (ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataSetError(
                f"{path}: expected JSON with name and splits of name and shardLengths: {error!r}"
            ) from error
        if kind != "tfrecord":
            raise DataSetError(f"{path}: fileFormat is {kind!r}, expected 'tfrecord': prepare it again in that format")
        template = splits[split].get("filepathTemplate", DEFAULT_TEMPLATE)
        fields = {"DATASET": name, "SPLIT": split, "FILEFORMAT": kind, "NUM_SHARDS": f"{len(lengths):05d}"}
        paths = []
        for shard in range(len(lengths)):
            fields["SHARD_INDEX"] = f"{shard:05d}"
            fields["SHARD_X_OF_Y"] = f"{shard:05d}-of-{len(lengths):05d}"
            paths.append(self.directory / shard_name(template, fields, path))
        missing = [path.name for path in paths if not os.path.isfile(path)]  # False for names no file can have
        if missing and not self._skip_bad:
            present = sorted(path.name for path in self.directory.glob("*tfrecord*"))
            raise FileNotFoundError(f"{self.directory}: missing shards {missing}, found {present or 'none'}: {_HINT}")
        return split, name, lengths, paths

    def _index(self) -> list[tuple[Path, RecordSpan]]:
        records: list[tuple[Path, RecordSpan]] = []
        for path, declared in zip(self.shard_paths, self.shard_lengths, strict=True):
            count = len(records)
            try:
                for span in iter_spans(regular_file(path, self.directory)):
                    records.append((path, span))
                if len(records) - count < declared:
                    raise DataSetError(
                        f"{path}: {len(records) - count} records, dataset_info.json declares {declared}: {_HINT}"
                    )
            except DataSetError as error:
                if not self._skip_bad:
                    raise
                self.problems[path.name] = error
        return records

    def find_instruction(self, key: str | None) -> str:
        """Flat name of the text feature; MissingFeatureError when there is none, DataSetError for another kind."""
        name = _OTHER_INSTRUCTION if key is None and _INSTRUCTION not in self.features else _INSTRUCTION
        if key is not None or name not in self.features:
            name = flat_name("steps/", key or "language_instruction")
        spec = self.require(name)
        if spec.dtype != "string" or spec.kind == "other":
            raise DataSetError(f"{self.features_path}: {name} is {spec.kind} of {spec.dtype!r}, expected text")
        return name

    def instruction(self, values: Mapping, where: str, name: str = _INSTRUCTION) -> list[str]:
        """Text of every step of an episode, or the only one of the episode; `where` is for messages."""
        return [text(value, name, where) for value in get(values, name, where)]

    def numbers(self, values: Mapping, name: str, length: int, where: str) -> np.ndarray:
        """Declared feature `name` of an episode of `length` steps, (T, ...)."""
        return step_array(get(values, name, where), self.require(name), length, where)

    def images(self, values: Mapping, name: str, length: int, where: str) -> list[bytes]:
        """T encoded images of a flat feature."""
        frames = get(values, name, where)
        if len(frames) != length or not isinstance(frames, list):
            raise CorruptRecordError(
                f"{where}: {name} has {len(frames)} {type(frames).__name__} entries, expected {length} byte strings"
            )
        return frames

    def _build_episode(self, index: int, values: Mapping, where: str) -> Episode:
        texts = self.instruction(values, where)
        if not texts:
            raise CorruptRecordError(f"{where}: {_INSTRUCTION} is empty, expected one text per step")
        length = len(texts)

        def optional(name: str) -> np.ndarray | None:
            if name not in self.features or name not in values:
                return None
            return self.numbers(values, name, length, where)

        file_path = get(values, _FILE_PATH, where) if _FILE_PATH in values else []
        return Episode(
            index=index,
            instruction=texts[0],
            actions=self.numbers(values, _ACTION, length, where),
            state=self.numbers(values, _STATE, length, where),
            joint_state=optional(_JOINTS),
            images={key: self.images(values, f"{_IMAGE_PREFIX}{key}", length, where) for key in self.camera_keys},
            file_path=text(file_path[0], _FILE_PATH, where) if len(file_path) else "",
            **{
                name: optional(f"steps/{name}") for name in ("reward", "discount", "is_first", "is_last", "is_terminal")
            },
        )


def write_rlds(
    directory: str | os.PathLike,
    name: str,
    episodes: Iterable[Episode],
    shards: int = 1,
    image_shape: tuple[int, int, int] = (256, 256, 3),
    metadata: dict | None = None,
) -> Path:
    """Write LIBERO-layout episodes as the version directory `directory` (`<root>/<name>/<x.y.z>`).

    Everything is written to a hidden directory beside it, which is renamed at the end: an exception (also one raised
    by `episodes`) leaves nothing behind. Episodes are distributed over `shards` files in order. `image_shape` is
    (H, W, 3) of both cameras; `metadata` goes to `craft_metadata.json`.

    Raises FileExistsError when `directory` exists, ValueError for a name that is not a version or for episodes that
    do not have the LIBERO layout (actions (T,7), state (T,8), joint_state (T,7), cameras image and wrist_image).
    """
    directory = Path(directory)
    if not VERSION.fullmatch(directory.name):
        raise ValueError(f"{directory}: the last part must be a version x.y.z")
    if directory.exists():
        raise FileExistsError(f"{directory} exists already")
    with temporary_beside(directory) as temporary:
        temporary.mkdir()
        spool = temporary / "spool"
        spans = write_records(spool, (_episode_payload(episode, image_shape) for episode in episodes))
        lengths = write_shards(temporary, name, spool, spans, shards)
        write_json(temporary / "features.json", libero_features(image_shape))
        info = dataset_info(name, directory.name, lengths, sum(span.length for span in spans))
        write_json(temporary / "dataset_info.json", info)
        if metadata is not None:
            write_json(temporary / METADATA_FILE, metadata)
        os.replace(temporary, directory)
    return directory


def _episode_payload(episode: Episode, image_shape: tuple[int, int, int]) -> bytes:
    length = len(episode)
    where = f"episode {episode.index} ({episode.instruction!r})"
    if length == 0:
        raise ValueError(f"{where} has no steps")
    first, last = np.zeros(length, dtype=bool), np.zeros(length, dtype=bool)
    first[0], last[-1] = True, True

    def given(value: np.ndarray | None, default: np.ndarray) -> np.ndarray:
        return default if value is None else value

    arrays: dict[str, tuple[Any, tuple[int, ...]]] = {
        _ACTION: (episode.actions, (length, 7)),
        _STATE: (episode.state, (length, 8)),
        _JOINTS: (episode.joint_state, (length, 7)),
        "steps/reward": (given(episode.reward, last.astype(np.float32)), (length,)),
        "steps/discount": (given(episode.discount, np.ones(length, dtype=np.float32)), (length,)),
        "steps/is_first": (given(episode.is_first, first), (length,)),
        "steps/is_last": (given(episode.is_last, last), (length,)),
        "steps/is_terminal": (given(episode.is_terminal, last), (length,)),
    }
    features: dict = {
        _INSTRUCTION: [episode.instruction.encode("utf-8")] * length,
        _FILE_PATH: [episode.file_path.encode("utf-8")],
    }
    for name, (value, shape) in arrays.items():
        if np.shape(value) != shape:
            raise ValueError(f"{where}: {name} has shape {np.shape(value)}, expected {shape}")
        if not np.all(np.isfinite(value)):
            raise ValueError(f"{where}: {name} holds values that are not finite")
        features[name] = np.asarray(value)
    features.update(_image_features(episode, image_shape, where))
    return build_example(features)


def _image_features(episode: Episode, image_shape: tuple[int, int, int], where: str) -> dict[str, list[bytes]]:
    features = {}
    for key in ("image", "wrist_image"):
        frames = episode.images.get(key, [])
        if len(frames) != len(episode):
            raise ValueError(f"{where}: camera {key!r} has {len(frames)} images, expected {len(episode)}")
        for step, frame in enumerate(frames):
            with Image.open(io.BytesIO(frame), formats=("JPEG", "PNG")) as image:
                found = (image.format, image.height, image.width, len(image.getbands()))
            if found != ("JPEG", *image_shape):
                raise ValueError(f"{where}: {key} at step {step} is {found}, expected {('JPEG', *image_shape)}")
        features[f"{_IMAGE_PREFIX}{key}"] = frames
    return features
