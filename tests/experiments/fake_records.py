"""Made-up records of a table, written through the public functions: for tests of what is made of records."""

import random

from craft_experiments.jobs.plan import plan
from craft_experiments.records import write_record
from craft_experiments.settings import RunConfig, resolve
from craft_experiments.tables import table

TASKS, STARTS = (2, 6), tuple(range(10))


def settings(folder, name, **flags):
    """Settings of a table with all folders in `folder`; without a preset the archived one, which stays as it is."""
    folders = {"work_dir": str(folder / "work"), "records_dir": str(folder / "records")}
    flags = {"preset": "tiny-archive"} | flags
    return resolve(RunConfig(results_dir=str(folder / "results"), **folders, **flags), name)


def facts(s, job, seconds=60.0):
    """The fields that every record has."""
    return job.facts(s, {"seconds": seconds, "processor_seconds": seconds * 0.9}, job.content(s))


def evaluation(s, job, outcomes, seconds=60.0):
    """Write one evaluation: {(task, initial state): success}."""
    episodes = [[task, start, int(success), 100] for (task, start), success in sorted(outcomes.items())]
    rate = round(sum(outcomes.values()) / len(outcomes), 4)
    write_record(job.record(s), facts(s, job, seconds) | {"rate": rate, "episodes": episodes})


def training(s, job, metrics, seconds=600.0):
    """Write one training: {metric: values}, `step` among them."""
    write_record(job.record(s), facts(s, job, seconds) | {"metrics": metrics})


def retention(s, job, measured):
    """Write what `measure_retention.py` found."""
    write_record(job.record(s), facts(s, job) | {"retention": measured})


def measured(rng):
    """A report of `measure_retention.py`, of its numbers those that are read."""
    drift = rng.uniform(0.003, 0.2)
    return {
        "drift": {"original": {"rel_mse": {"total": drift, "raw": drift, "aq": drift}}},
        "cka": {"raw": 1 - drift, "aq": None},
        "probe": {
            name: {"position_r2": {"mean": 0.9 - drift}, "instruction_accuracy": 0.95}
            for name in ("start", "trained", "stale")
        },
        "action_l1": {"start": 0.1, "trained": 0.2 + drift, "start_head": 0.12 + drift},
    }


def curves(rng, job, steps=100):
    """Metrics of one training, with the constraint's when it has one."""
    budget = float(job.cell.method.train.get("craft_retention_budget", 0.01))
    found = {
        "step": [10 * (i + 1) for i in range(steps)],
        "VLA Train/Loss": [0.11 + 0.4 / (i + 1) + rng.gauss(0, 0.004) for i in range(steps)],
        "VLA Train/Curr Action L1 Loss": [0.09 + 0.3 / (i + 1) for i in range(steps)],
    }
    if job.cell.method.train.get("use_craft"):
        grown = [budget * min(1.0, (i + 1) / 20) for i in range(steps)]
        found["CRaFT/Retention Loss"] = [value * rng.uniform(0.8, 1.2) for value in grown]
        found["CRaFT/Lambda"] = [min(1.0, i / steps) * rng.uniform(0.08, 0.12) for i in range(steps)]
    return found


def fill(s, name, share=1.0, seed=0):
    """Write made-up records of a table, or of about a share of its jobs."""
    rng = random.Random(seed)
    for job in plan(s, table(name, s.preset, s.methods)).values():
        if job.record(s) is None or rng.random() > share:
            continue
        if job.kind == "train":
            training(s, job, curves(rng, job), rng.uniform(500, 900))
        elif job.kind == "measure":
            retention(s, job, measured(rng))
        else:
            rate = 0.1 if job.cell.method.control else rng.uniform(0.5, 0.95)
            evaluation(s, job, {(t, i): rng.random() < rate for t in TASKS for i in STARTS})
