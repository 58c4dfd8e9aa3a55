"""How fast samples come from disk: our loader per worker count beside tensorflow-datasets + tf.data on the same files.

    python benchmarks/synthetic_data.py --output runs/synthetic
    python benchmarks/data_loading.py --data_root runs/synthetic --tf_python PYTHON_WITH_TENSORFLOW

Every measurement is a process of its own, tied to as many cores as its row says; the order is shuffled in each round
and a row is compared with the TensorFlow row of the same cores in the same round. Both sides decode two 256 px JPEG
images per sample, resize them to 224 px with a Lanczos filter, augment them and build batches. Without --tf_python only
our rows are measured. Writes results/data_loading/data_loading.json and the section of docs/performance.md made from it
(`--report_only True`: only the section).
"""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmark_page import write_section

from prismatic.command_line import bad_input_in_one_line, flag, parse_or_exit
from prismatic.progress import over, say

HERE = Path(__file__).parent


@dataclass
class LoadingConfig:
    """Flags."""

    data_root: str = "runs/synthetic"
    name: str = "libero_synthetic"
    small_root: str = flag("", "the same data with fewer frames: how memory depends on the size")
    tf_python: str = flag("", "interpreter with the extra `tfds`; empty: no comparison")
    shuffle_buffer: int = flag(100_000, "of the TensorFlow pipeline, the published default", at_least=1)
    batch_size: int = flag(32, at_least=1)
    batches: int = flag(60, at_least=1)
    rounds: int = flag(5, at_least=1)
    seed: int = flag(0, at_least=0)
    output: str = "results/data_loading/data_loading.json"
    report: str = "docs/performance.md"
    report_only: bool = False
    measure_workers: int | None = flag(
        None, "measure one of our rows in this process, print JSON", at_least=0, at_most=256
    )


@dataclass(frozen=True)
class Row:
    """workers: data loader processes, 0 = in the training process; None: TensorFlow."""

    label: str
    cores: int
    workers: int | None
    cold: bool = False
    small: bool = False


ROWS = (
    Row("ours, in the training process", 1, 0),
    Row("ours, 1 worker", 1, 1),
    Row("ours, 2 workers", 2, 2),
    Row("ours, in the training process, first use (index is built)", 1, 0, cold=True),
    Row("ours, in the training process, a tenth of the data", 1, 0, small=True),
    Row("tensorflow-datasets + tf.data, 1 thread", 1, None),
    Row("tensorflow-datasets + tf.data, 2 threads", 2, None),
)


def main() -> None:
    """Measure all rows in shuffled rounds, or one row."""
    cfg = parse_or_exit(LoadingConfig, __doc__)
    if cfg.measure_workers is not None:
        print(json.dumps(measure(cfg)))
        return
    with bad_input_in_one_line("data_loading.py", (FileNotFoundError,)):
        if not cfg.report_only:
            for root in filter(None, (cfg.data_root, cfg.small_root)):
                directory(root, cfg.name)
            measure_rows(cfg)
        content = json.loads(Path(cfg.output).read_text(encoding="utf-8"))
    write_section(Path(cfg.report), "data_loading", report(content))


def measure_rows(cfg: LoadingConfig) -> None:
    """All rows in shuffled rounds."""
    rows = [row for row in ROWS if (row.workers is not None or cfg.tf_python) and (not row.small or cfg.small_root)]
    shuffler, measured = random.Random(cfg.seed), {row.label: [] for row in rows}
    for number in over(range(cfg.rounds), "measuring", "rounds"):
        for row in shuffler.sample(rows, len(rows)):
            measured[row.label].append(run(cfg, row))
            say(f"round {number}: {row.label}: {measured[row.label][-1]}")
        write(cfg, rows, measured)


def directory(root: str, name: str) -> Path:
    """Version folder of a data set; FileNotFoundError says how to make one."""
    versions = sorted((Path(root) / name).glob("*.*.*"))
    if not versions:
        raise FileNotFoundError(f"found no data set {name} below {root}; benchmarks/synthetic_data.py writes one")
    return versions[-1]


def run(cfg: LoadingConfig, row: Row) -> dict[str, float]:
    """One measurement in a process of its own."""
    root = cfg.small_root if row.small else cfg.data_root
    place = directory(root, cfg.name)
    if row.cold:
        shutil.rmtree(place / ".craft_index", ignore_errors=True)
    if row.workers is None:
        numbers = (cfg.batch_size, cfg.batches, row.cores, cfg.shuffle_buffer)
        command = [cfg.tf_python, str(HERE / "tfdata_pipeline.py"), str(place), *map(str, numbers)]
    else:
        command = [sys.executable, __file__, "--data_root", root, "--name", cfg.name]
        command += ["--measure_workers", str(row.workers)]
        command += ["--batch_size", str(cfg.batch_size), "--batches", str(cfg.batches)]
    cores = sorted(os.sched_getaffinity(0))[: row.cores]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=quiet,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{row.label}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(cfg: LoadingConfig) -> dict[str, float]:
    """Seconds to the first batch and for the later ones; memory of this process (GiB), peak and before opening."""
    import torch
    from torch.utils.data import DataLoader

    from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
    from prismatic.vla.datasets.sampler import EpochSampler

    torch.set_num_threads(1)
    before = resident_gib()
    started = time.perf_counter()
    dataset = VLADataset(cfg.data_root, cfg.name, DatasetSettings())
    loader = DataLoader(
        dataset, cfg.batch_size, sampler=EpochSampler(len(dataset)), num_workers=cfg.measure_workers, collate_fn=stack
    )
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in islice(batches, cfg.batches):
        pass
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    samples = cfg.batches * cfg.batch_size
    times = {"first_batch": first, "seconds": seconds, "samples": samples}
    frames = dataset.statistics[cfg.name]["num_transitions"]
    return times | {"peak_gib": peak, "before_gib": before, "frames": frames}


def stack(samples: list[dict]) -> dict:
    """Arrays of a batch; tokens belong to the model, not to this comparison."""
    import numpy as np

    return {name: np.stack([sample[name] for sample in samples]) for name in ("images", "actions", "proprio")}


def resident_gib() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def write(cfg: LoadingConfig, rows: list[Row], measured: dict[str, list]) -> None:
    """Raw measurements of all finished rounds."""
    info = json.loads((directory(cfg.data_root, cfg.name) / "dataset_info.json").read_text())
    content = {
        "batch_size": cfg.batch_size,
        "batches": cfg.batches,
        "shuffle_buffer": cfg.shuffle_buffer,
        "bytes": sum(int(split["numBytes"]) for split in info["splits"]),
        "python": platform.python_version(),
        "rows": [
            {"label": row.label, "cores": row.cores, "workers": row.workers, "rounds": measured[row.label]}
            for row in rows
        ],
    }
    path = Path(cfg.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


HEAD = """\
# How fast samples come from disk

This section is written by `python benchmarks/data_loading.py` from `results/data_loading/data_loading.json`.
Do not edit.

One sample is two 256 px JPEG images, decoded, resized to 224 px with a Lanczos filter and augmented, with its action
chunk. Every measurement is a process of its own on the stated cores; a ratio is the median over rounds, with the range,
of a row against the TensorFlow row on the same cores in the same round (tensorflow-datasets + tf.data with the
published shuffle buffer of encoded frames). Imports are not counted. Both sides read from the page cache.
"""


def report(content: dict) -> str:
    """The section."""
    command = (
        f"python benchmarks/data_loading.py --batch_size {content['batch_size']} --batches {content['batches']} "
        f"--rounds {len(content['rows'][0]['rounds'])} --data_root ... --small_root ... --tf_python ..."
    )
    lines = [HEAD, f"    {command}", ""]
    frames = max(measured.get("frames", 0) for row in content["rows"] for measured in row["rounds"])
    size = f"{frames:,} frames in {content['bytes'] / 2**30:.2f} GiB"
    lines.append(f"{size}; batches of {content['batch_size']}; shuffle buffer {content['shuffle_buffer']:,}.")
    lines += [
        "",
        "| loader | cores | samples/s | samples/s to TensorFlow | first batch, s | first batch to TensorFlow "
        "| peak memory, GiB | peak to TensorFlow |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reference = {row["cores"]: row["rounds"] for row in content["rows"] if row["workers"] is None}
    for row in content["rows"]:
        rounds, other = row["rounds"], reference.get(row["cores"])
        cells = [row["label"], str(row["cores"])]
        for value, digits in ((speed, 0), (lambda r: r["first_batch"], 2), (lambda r: r["peak_gib"], 2)):
            cells.append(f"{statistics.median(value(r) for r in rounds):.{digits}f}")
            cells.append(ratio(value, rounds, other) if other and row["workers"] is not None else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed(measured: dict) -> float:
    """Samples per second after the first batch."""
    return measured["samples"] / measured["seconds"]


def ratio(value: Callable[[dict], float], rounds: list[dict], reference: list[dict]) -> str:
    """Median over rounds of a quantity against the reference, with its range."""
    ratios = [value(ours) / value(theirs) for ours, theirs in zip(rounds, reference, strict=True)]
    return f"{statistics.median(ratios):.2g} ({min(ratios):.2g}-{max(ratios):.2g})"


if __name__ == "__main__":
    main()
