"""The samples of `VLADataset` made by tensorflow-datasets and tf.data, for comparison. Needs the extra `tfds`.

    python benchmarks/tfdata_pipeline.py DIRECTORY BATCH_SIZE BATCHES THREADS SHUFFLE

Prints one JSON line: seconds to the first batch (after the imports) and for the later ones, peak memory. The pipeline
is the usual one of RLDS training: episodes -> windows -> shuffle buffer of encoded frames -> decode, Lanczos resize,
augmentation -> batch.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import tensorflow as tf
import tensorflow_datasets as tfds

CHUNK, SIDE = 8, 224
CAMERAS = ("image", "wrist_image")


def pipeline(directory: str, batch_size: int, threads: int, shuffle: int) -> tf.data.Dataset:
    """Endless batches of images (B, 2, 224, 224, 3) uint8, actions (B, 8, 7), proprio (B, 8)."""
    builder = tfds.builder_from_directory(directory)
    images = {camera: tfds.decode.SkipDecoding() for camera in CAMERAS}
    data = builder.as_dataset(
        split="train",
        shuffle_files=True,
        decoders={"steps": {"observation": images}},
        read_config=tfds.ReadConfig(interleave_cycle_length=threads),
    )
    data = data.repeat().flat_map(windows)
    data = data.shuffle(shuffle).map(prepare, num_parallel_calls=threads).batch(batch_size).prefetch(1)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    return data.with_options(options)


def windows(episode: dict) -> tf.data.Dataset:
    """Every start of a chunk of one episode."""
    steps = episode["steps"].batch(10_000).get_single_element()
    count = tf.shape(steps["action"])[0] - CHUNK + 1
    starts = tf.range(count)
    observation = steps["observation"]
    return tf.data.Dataset.from_tensor_slices(
        {
            "images": tf.stack([observation[camera][:count] for camera in CAMERAS], axis=1),
            "proprio": observation["state"][:count],
            "actions": tf.gather(steps["action"], starts[:, None] + tf.range(CHUNK)[None]),
            "instruction": steps["language_instruction"][:count],
        }
    )


def prepare(sample: dict) -> dict:
    """Decode, resize and augment both cameras."""
    frames = [augment(resize(tf.io.decode_jpeg(sample["images"][c], channels=3))) for c in range(len(CAMERAS))]
    return sample | {"images": tf.stack(frames)}


def resize(image: tf.Tensor) -> tf.Tensor:
    """uint8 (H, W, 3) -> uint8 (224, 224, 3)."""
    resized = tf.image.resize(image, (SIDE, SIDE), method="lanczos3", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)


def augment(image: tf.Tensor) -> tf.Tensor:
    """Random crop of 90 % of the area, brightness, contrast, saturation, hue."""
    image = tf.image.convert_image_dtype(image, tf.float32)
    side = 0.9**0.5
    y, x = (tf.random.uniform((), 0, 1 - side) for _ in range(2))
    box = tf.stack([y, x, y + side, x + side])[None]
    image = tf.image.crop_and_resize(image[None], box, [0], (SIDE, SIDE))[0]
    image = tf.clip_by_value(tf.image.random_brightness(image, 0.2), 0, 1)
    image = tf.clip_by_value(tf.image.random_contrast(image, 0.8, 1.2), 0, 1)
    image = tf.clip_by_value(tf.image.random_saturation(image, 0.8, 1.2), 0, 1)
    image = tf.clip_by_value(tf.image.random_hue(image, 0.05), 0, 1)
    return tf.image.convert_image_dtype(image, tf.uint8, saturate=True)


def main() -> None:
    """Time the batches."""
    directory, batch_size, batches, threads, shuffle = sys.argv[1], *map(int, sys.argv[2:])
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    started = time.perf_counter()
    iterator = iter(pipeline(directory, batch_size, threads, shuffle))
    next(iterator)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"first_batch": first, "seconds": seconds, "samples": batches * batch_size, "peak_gib": peak}))


if __name__ == "__main__":
    main()
