"""Write a small LeRobot v3 data set, as a lab with an arm of five joints and a gripper records it: drawn, not filmed.

    python examples/make_own_data.py DATA/my_arm

Prints nothing. Recording programs write such files; examples/own_data.py reads them.
"""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from prismatic.command_line import OneLineParser, bad_input_in_one_line

FPS, LENGTH, TASKS = 30, 60, ("push the red block to the left", "lift the red block")
CAMERAS = ("observation.images.front", "observation.images.wrist")


def png(camera, state):
    """A camera image of a red block that moves with two joints, as PNG."""
    pixels = np.full((120, 160, 3), 40 + 60 * CAMERAS.index(camera), np.uint8)
    row, column = 50 + int(state[1]), 70 + int(state[0])
    pixels[row : row + 20, column : column + 20] = 200, 30, 30
    Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def frames(episode):
    """The rows of an episode: targets are where the joints are three frames later."""
    phase = np.linspace(0, np.pi, LENGTH + 3)[:, None] + 0.3 * episode
    joints = np.hstack([40 * np.sin(phase + joint) for joint in range(5)] + [50 + 50 * np.sign(np.cos(phase))])
    joints = joints.astype(np.float32)  # degrees, and the gripper from 0 (closed) to 100 (open)
    for step in range(LENGTH):
        row = {"action": joints[step + 3], "observation.state": joints[step], "timestamp": np.float32(step / FPS)}
        row |= {"frame_index": step, "episode_index": episode, "index": episode * LENGTH + step}
        yield row | {"task_index": episode % 2} | {camera: png(camera, joints[step]) for camera in CAMERAS}


def write(folder, episodes=4):
    """All files of the data set, in a new folder."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(parents=True)
    vector = {"dtype": "float32", "shape": [6], "names": ["pan", "lift", "elbow", "flex", "roll", "gripper"]}
    image = {"dtype": "image", "shape": [120, 160, 3], "names": ["height", "width", "channels"]}
    features = {"action": vector, "observation.state": vector} | dict.fromkeys(CAMERAS, image)
    info = {"codebase_version": "v3.0", "fps": FPS, "features": features, "splits": {"train": f"0:{episodes}"}}
    info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    rows = [
        {"episode_index": n, "length": LENGTH, "data/chunk_index": 0, "data/file_index": 0} for n in range(episodes)
    ]
    tables = {"data/chunk-000/file-000": [frame for episode in range(episodes) for frame in frames(episode)]}
    tables |= {"meta/episodes/chunk-000/file-000": rows}
    tables |= {"meta/tasks": [{"task_index": number, "task": task} for number, task in enumerate(TASKS)]}
    for name, content in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(content), folder / f"{name}.parquet")
    (folder / "meta" / "info.json").write_text(json.dumps(info))


if __name__ == "__main__":
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new one, with the name my_arm")
    with bad_input_in_one_line("make_own_data.py"):
        write(parser.parse_args().folder)
