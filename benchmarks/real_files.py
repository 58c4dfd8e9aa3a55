"""Data sets written by the lerobot and tensorflow-datasets packages, read here and compared frame by frame.

Each package in an environment of its own (they need other versions of much), this one for the comparison:

    lerobot-env/bin/python benchmarks/real_files.py write-lerobot /tmp/real
    tfds-env/bin/python    benchmarks/real_files.py write-tfds /tmp/real
    .venv/bin/python       benchmarks/real_files.py compare /tmp/real

What was put in lies in `<set>.npz` beside each set. Numbers, texts and PNG pixels have to be equal. Video frames are
compared with a plain decoding of the file from its start, exactly, and with what was put in: every frame has to be
nearer to its own picture than to that of any other step. The package itself is not needed to read, only to write.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import types
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the environments of the writers lack this package
from prismatic.command_line import OneLineParser, UsageError, bad_input_in_one_line, is_installed  # noqa: E402
from prismatic.output_folder import check_folder  # noqa: E402

FPS = 30
CAMERAS = ("observation.images.front", "observation.images.wrist")
LENGTHS = (30, 29, 41, 12, 33, 25)
TASKS = ("pick up the cup", "open the drawer")
SIDE = (48, 64)


def picture(episode: int, step: int, camera: int) -> np.ndarray:
    """uint8 (H, W, 3): a smooth picture, as a codec expects, that no other step has."""
    rows, columns = np.mgrid[0 : SIDE[0], 0 : SIDE[1]]
    phase = 0.35 * step + 1.7 * episode + 0.9 * camera
    planes = [np.sin(rows / 9 + phase), np.cos(columns / 11 - phase), np.sin((rows + columns) / 13 + 2 * phase)]
    return (127.5 + 110 * np.stack(planes, axis=-1)).astype(np.uint8)


def numbers(episode: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Actions (T, 7), state (T, 8) and a scalar (T,), float32."""
    rng = np.random.default_rng(episode)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in ((length, 7), (length, 8), (length,)))


def save(root: Path, name: str, texts: list[list[str]]) -> None:
    """What the reader has to give back."""
    content = {"texts": np.array([text for episode in texts for text in episode])}
    parts = [numbers(episode, length) for episode, length in enumerate(LENGTHS)]
    for key, arrays in zip(("actions", "state", "scalar"), zip(*parts, strict=True), strict=True):
        content[key] = np.concatenate(arrays)
    np.savez_compressed(root / f"{name}.npz", **content)


# Writing


def write_lerobot(root: Path) -> None:
    """Two LeRobot sets, cameras as video and as pictures, by the installed package."""
    _stand_in_for_torchvision()
    import lerobot

    module = importlib.import_module("lerobot.datasets.lerobot_dataset")
    for use_videos in (True, False):
        name = f"lerobot-{lerobot.__version__}-{'video' if use_videos else 'image'}"
        shutil.rmtree(root / name, ignore_errors=True)
        kind = "video" if use_videos else "image"
        features = {
            key: {"dtype": kind, "shape": (*SIDE, 3), "names": ["height", "width", "channels"]} for key in CAMERAS
        }
        for key, size in (("action", 7), ("observation.state", 8), ("observation.scalar", 1)):
            features[key] = {"dtype": "float32", "shape": (size,), "names": [f"{key}_{i}" for i in range(size)]}
        data = module.LeRobotDataset.create(
            f"real/{name}", FPS, features, root=root / name, robot_type="arm", use_videos=use_videos
        )
        texts = []
        for episode, length in enumerate(LENGTHS):
            actions, state, scalar = numbers(episode, length)
            texts.append([TASKS[episode % 2]] * length)
            for step in range(length):
                frame = {key: picture(episode, step, camera) for camera, key in enumerate(CAMERAS)}
                frame |= {"action": actions[step], "observation.state": state[step]}
                data.add_frame(frame | {"observation.scalar": scalar[step : step + 1], "task": texts[-1][step]})
            data.save_episode()
        if hasattr(data, "finalize"):
            data.finalize()
        save(root, name, texts)
        print(f"written {name}: {sum(LENGTHS)} steps")


def _stand_in_for_torchvision() -> None:
    """lerobot imports it for transforms and for reading videos; writing data needs none of it."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    else:
        return

    import datasets  # noqa: F401 - looks for the real one

    class Anything(types.ModuleType):
        __path__: list = []

        def __getattr__(self, name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {"__init__": lambda self, *args, **kwargs: None})

    parts = ("", ".io", ".transforms", ".transforms.v2", ".transforms.v2.functional", ".transforms.functional", ".ops")
    for part in parts:
        sys.modules[f"torchvision{part}"] = Anything(f"torchvision{part}")
    for part in parts[1:]:
        above, _, last = f"torchvision{part}".rpartition(".")
        setattr(sys.modules[above], last, sys.modules[f"torchvision{part}"])


def _tfds_episode(episode: int, texts: list[str]) -> dict:
    """Steps of `write_tfds`. `texts`: one per step."""
    import tensorflow_datasets as tfds

    actions, state, scalar = numbers(episode, LENGTHS[episode])
    box = tfds.features.BBox(0.1, 0.2, 0.3, 0.4)
    steps = [
        {
            "observation": {
                "front": picture(episode, t, 0),
                "wrist": picture(episode, t, 1),
                "state": state[t],
                "scalar": scalar[t],
                "cloud": np.zeros((4, 3), np.float32),
                "boxes": [box] * (t % 3),
            },
            "action": actions[t],
            "phase": t % 3,
            "language_instruction": texts[t],
        }
        for t in range(LENGTHS[episode])
    ]
    return {"steps": steps}


def _tfds_order(folder: Path) -> list[int]:
    """Numbers of the episodes as they lie in the files, which is in the order of hashed keys."""
    import tensorflow_datasets as tfds

    order = []
    read = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    for example in tfds.as_numpy(tfds.builder_from_directory(str(folder)).as_dataset("train", read_config=read)):
        first = next(iter(example["steps"]))["action"]
        order.append(next(e for e, length in enumerate(LENGTHS) if np.array_equal(numbers(e, length)[0][0], first)))
    return order


def write_tfds(root: Path) -> None:
    """An RLDS set with many kinds of features, in several shards and two splits, by tensorflow-datasets."""
    import tensorflow_datasets as tfds

    name = "tfds_arm"
    shutil.rmtree(root / name, ignore_errors=True)
    texts = [[TASKS[(episode + (step > 20)) % 2] for step in range(length)] for episode, length in enumerate(LENGTHS)]
    tensor = tfds.features.Tensor
    observation = {
        "front": tfds.features.Image(shape=(*SIDE, 3), encoding_format="png"),
        "wrist": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "state": tensor(shape=(8,), dtype=np.float32),
        "scalar": tfds.features.Scalar(dtype=np.float32),
        "cloud": tensor(shape=(4, 3), dtype=np.float32, encoding="zlib"),
        "boxes": tfds.features.Sequence(tfds.features.BBoxFeature()),
    }
    step = {
        "observation": tfds.features.FeaturesDict(observation),
        "action": tensor(shape=(7,), dtype=np.float32),
        "phase": tfds.features.ClassLabel(num_classes=3),
        "language_instruction": tfds.features.Text(),
    }

    class TfdsArm(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step)})
            return tfds.core.DatasetInfo(builder=self, features=features, description="x")

        def _split_generators(self, dl_manager):
            everything = range(len(LENGTHS))
            splits = {"train": everything, "val": (1, 3)}
            return {split: ((e, _tfds_episode(e, texts[e])) for e in part) for split, part in splits.items()}

        def _generate_examples(self, *args):
            yield from args

    config = tfds.download.DownloadConfig(num_shards=2)
    TfdsArm(data_dir=str(root)).download_and_prepare(download_config=config)
    order = _tfds_order(root / name / "1.0.0")
    save(root, name, texts)
    np.save(root / f"{name}-order.npy", np.array(order))
    print(f"written {name}: {sum(LENGTHS)} steps in the order {order}")


# Comparing


def compare(root: Path) -> int:
    """Read every set that was written; returns the number of differences."""
    from prismatic.vla.datasets.format_table import find_format
    from prismatic.vla.datasets.formats import open_source
    from prismatic.vla.datasets.inspect_measures import read_pixels
    from prismatic.vla.datasets.source import SourceKeys

    keys = {
        "lerobot": SourceKeys("lerobot", CAMERAS, ("observation.state", "observation.scalar"), "action"),
        "rlds": SourceKeys("rlds", ("front", "wrist"), ("state", "scalar"), "action"),
    }
    total = wrong = 0
    for expected in sorted(root.glob("*.npz")):
        folder = root / expected.stem
        source = open_source(folder, keys[find_format(folder)])
        order_file = root / f"{expected.stem}-order.npy"
        order = np.load(order_file, allow_pickle=False).tolist() if order_file.is_file() else list(range(len(LENGTHS)))
        content, starts = np.load(expected, allow_pickle=False), np.cumsum((0, *LENGTHS))
        found = wrong_here = 0
        for number, episode in enumerate(order):
            rows = slice(starts[episode], starts[episode + 1])
            state = np.concatenate([content["state"][rows], content["scalar"][rows, None]], axis=1)
            wrong_here += not np.array_equal(source.actions(number), content["actions"][rows])
            wrong_here += not np.array_equal(source.state(number), state)
            texts = [source.instruction_at(number, step) for step in range(LENGTHS[episode])]
            wrong_here += texts != content["texts"][rows].tolist()
            for camera, key in enumerate(source.keys.cameras):
                shown = np.stack([read_pixels(source, key, number, step) for step in range(LENGTHS[episode])])
                wrong_here += _count_wrong(source, key, number, shown, [episode, camera])
                found += len(shown)
        if len(source) != len(LENGTHS):
            wrong_here += 1
        print(f"{expected.stem}: {len(source)} episodes, {found} images, {wrong_here} differences; {source.warnings}")
        total, wrong = total + found, wrong + wrong_here
    print(f"{total} images of {len(list(root.glob('*.npz')))} data sets compared, {wrong} differences")
    return wrong


def _count_wrong(source, key: str, number: int, shown: np.ndarray, place: list[int]) -> int:
    episode, camera = place
    own = np.stack([picture(episode, step, camera) for step in range(len(shown))])
    if key not in getattr(source, "_shapes", {}):
        return int((shown != own).any(axis=(1, 2, 3)).sum())
    distances = np.abs(shown[:, None].astype(np.int16) - own[None]).mean(axis=(2, 3, 4))
    wrong = int((distances.argmin(axis=1) != np.arange(len(shown))).sum())
    return wrong + int((shown != _decoded(source, key, number, len(shown))).any(axis=(1, 2, 3)).sum())


def _decoded(source, key: str, number: int, length: int) -> np.ndarray:
    """The frames of an episode by decoding its file from the start."""
    import av

    place = source._index.rows(f"place.{key}", number)[:, 0].tolist()
    file = str(source.directory / source._index.records[number][key])
    with av.open(file, options={"protocol_whitelist": "file"}) as container:
        frames = {frame.pts: frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}
    ordered = sorted(frames)
    # Frames of an episode follow each other in the file.
    first = ordered.index(place[0])
    assert ordered[first : first + length] == place
    return np.stack([frames[pts] for pts in place])


def main() -> int:
    """Command line entry."""
    writers = {"write-lerobot": ("lerobot", write_lerobot), "write-tfds": ("tensorflow_datasets", write_tfds)}
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=(*writers, "compare"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    package, write = writers.get(args.command, (None, None))
    with bad_input_in_one_line("real_files.py", (UsageError,)):
        check_folder(args.folder, "FOLDER")
        if package is not None and not is_installed(package):
            raise UsageError(f"{args.command} needs {package}: start it in an environment that has it")
        if package is None and not any(args.folder.glob("*.npz")):
            raise UsageError(f"FOLDER {args.folder}: found no data set that this program wrote")
    if write is None:
        return int(compare(args.folder) > 0)
    args.folder.mkdir(parents=True, exist_ok=True)
    write(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
