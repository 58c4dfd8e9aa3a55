"""Stands in for training, evaluation and collection in tests of the table driver. Written out as an interpreter.

`python-stub -m craft_experiments ...` is the real driver. Everything else leaves what the real program of that name
leaves (folders, logs, episodes.jsonl, metrics.jsonl), continues what is there, and takes an exclusive lock: a program
that runs twice at the same time fails and says so in STUB_VIOLATIONS.

    STUB_CALLS        file that gets every command line
    STUB_SLEEP        seconds of each training step and episode
    STUB_GATE         file with a number: while it is there, programs later than so many calls make one step, then wait
    STUB_MANIFEST     the driver's manifest; a copy of it is kept at each call, one a line, in STUB_CALLS.states
    STUB_<FAILURE>    suites for which COLLECT_FAILS, TRAIN_FAILS, NO_CHECKPOINT, STOPS_EARLY, EVAL_FAILS, CONSOLE_ONLY,
                      NO_FINAL_LINE or OTHER_EPISODES happens
    STUB_QUIET        no line per step or episode: the program outlives a driver that is killed
    STUB_PROCESSOR    trainings on processors of another name have other losses and weights; memory always differs
    STUB_HASHED       outcomes depend on cell and seed; otherwise every fourth trial fails
"""

import fcntl
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path

ARGUMENTS = sys.argv[1:]
CALL, STEPS = 0, []  # number of this call; one entry per step it made
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


def flag(name: str, default: str = "") -> str:
    """The last value given: a repeated flag wins."""
    found = [value for word, value in zip(ARGUMENTS, ARGUMENTS[1:]) if word == f"--{name}"]  # noqa: B905
    return found[-1] if found else default


def happens(failure: str, suite: str) -> bool:
    return suite in os.environ.get(f"STUB_{failure}", "").split()


def chance(*facts: object) -> float:
    return int(hashlib.sha256("/".join(map(str, facts)).encode()).hexdigest()[:8], 16) / 2**32


def pause() -> None:
    time.sleep(float(os.environ.get("STUB_SLEEP", "0")))
    STEPS.append(None)
    while len(STEPS) > 1 and allowed_calls() < CALL:
        time.sleep(0.01)


def allowed_calls() -> float:
    try:
        return float(Path(os.environ["STUB_GATE"]).read_text())
    except (KeyError, FileNotFoundError):
        return math.inf


def progress(line: str) -> None:
    if not os.environ.get("STUB_QUIET"):
        print(line, flush=True)


def alone(lock: Path) -> object:
    """Held until the process ends."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    stream = lock.open("a")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with open(os.environ["STUB_VIOLATIONS"], "a") as violations:
            violations.write(f"{lock}\n")
        sys.exit(f"{lock} is held: this program runs twice")
    return stream


def folder_at_once(folder: Path, file: str, text: str) -> None:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    (temporary / file).write_text(text)
    os.replace(temporary, folder)


def collect() -> None:
    suite = flag("task_suite_name")
    if happens("COLLECT_FAILS", suite):
        sys.exit(5)
    target = Path(flag("output_dir")) / flag("dataset_name") / "1.0.0"
    lock = alone(target.parent / "stub.lock")
    pause()
    folder_at_once(target, "dataset_info.json", "{}")
    lock.close()


def train() -> None:
    suite = next(name for name in SUITES if flag("dataset_name").startswith(name))
    print("training", suite, "PYTHONPATH" in os.environ)
    print("a warning on standard error", file=sys.stderr)
    root, name = Path(flag("run_root_dir")), flag("run_id_override")
    lock = alone(root / name / "stub.lock")
    if happens("TRAIN_FAILS", suite):
        sys.exit(17)
    save, last = int(flag("save_freq")), int(flag("max_steps"))
    saved = [
        int(found[1]) for p in root.iterdir() if (found := re.fullmatch(rf"{re.escape(name)}--(\d+)_chkpt", p.name))
    ]
    metrics, begin = root / name / "metrics.jsonl", max(saved, default=0)
    rows = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    metrics.write_text("".join(rows[: begin // save]))
    data = {flag("dataset_name"): {"fingerprint": "all of them"}}
    (root / name / "data_manifest.json").write_text(json.dumps(data))
    for step in range(begin + save, last + 1, save):
        pause()
        with metrics.open("a") as stream:
            processor = os.environ.get("STUB_PROCESSOR", "")
            values = {"VLA Train/Loss": chance(name, step, processor), "Memory/Peak GiB": time.time_ns() % 997 / 100}
            stream.write(json.dumps({"step": step, **values}) + "\n")
        progress(f"step {step}")
        if not happens("NO_CHECKPOINT", suite):
            folder_at_once(root / f"{name}--{step}_chkpt", "model.safetensors", f"{name} {step} {processor}\n")
        if happens("STOPS_EARLY", suite):
            break
    lock.close()


def episode(task: int, trial: int) -> dict:
    won = trial % 4 != 3
    if os.environ.get("STUB_HASHED"):
        cell = re.sub(r".*/|--\d+_chkpt", "", flag("pretrained_checkpoint", "replay"))
        won = chance(cell, flag("task_suite_name"), flag("init_noise_mm"), flag("seed"), task, trial) < 0.6
    place = {"suite": flag("task_suite_name"), "task_id": task, "init_idx": trial, "seed": int(flag("seed", "0"))}
    return place | {"status": "success" if won else "failure", "steps": 10 + trial}


def evaluate() -> None:
    suite, folder = flag("task_suite_name"), Path(flag("results_dir"))
    lock = alone(folder / "stub.lock")
    tasks = [int(word) for word in flag("task_ids", "0,1").split(",")]
    wanted = [(task, trial) for task in tasks for trial in range(int(flag("num_trials_per_task")))]
    store = folder / "episodes.jsonl"
    text = store.read_text() if store.exists() else ""
    text = text[: text.rfind("\n") + 1]  # a kill may leave half a line
    store.write_text(text)
    done = {(row["task_id"], row["init_idx"]): row for row in map(json.loads, text.splitlines())}
    for key in wanted:
        if key not in done:
            pause()
            done[key] = episode(*key)
            with store.open("a") as stream:
                stream.write(json.dumps(done[key]) + "\n")
            progress(f"episode {key}")
    won = sum(row["status"] == "success" for row in done.values())
    lines = [f"Task suite: {suite}", *(f"Success: {row['status'] == 'success'}" for row in done.values())]
    rate = won / len(done)
    facts = {} if happens("NO_FINAL_LINE", suite) else {"overall": {"success_rate": rate, "trials": len(done)}}
    facts["versions"] = {"simulator": "1"}
    (folder / "results.json").write_text(json.dumps(facts) + "\n")
    if facts:
        lines += [f"Total episodes: {len(done)}", f"Total successes: {won}"]
        lines += [f"Overall success rate: {rate:.4f} ({rate * 100:.1f}%)"]
    print("\n".join(lines))
    if not happens("CONSOLE_ONLY", suite):
        (folder / f"EVAL-{suite}-openvla-{time.time_ns()}.txt").write_text("\n".join(lines) + "\n")
    if happens("OTHER_EPISODES", suite):
        store.write_text(json.dumps(episode(0, 0)) + "\n")
    if happens("EVAL_FAILS", suite):
        sys.exit(3)
    lock.close()


def main() -> None:
    if ARGUMENTS[:1] == ["-m"] and ARGUMENTS[1].startswith("craft_experiments"):
        os.execv(sys.executable, [sys.executable, *ARGUMENTS])
    if "STUB_CALLS" in os.environ:
        with open(os.environ["STUB_CALLS"], "a") as calls:
            calls.write(" ".join([Path(sys.argv[0]).name, *ARGUMENTS]) + "\n")
        global CALL
        CALL = Path(os.environ["STUB_CALLS"]).read_text().count("\n")
    if "STUB_MANIFEST" in os.environ:
        with open(os.environ["STUB_CALLS"] + ".states", "a") as states:
            states.write(json.dumps(json.loads(Path(os.environ["STUB_MANIFEST"]).read_text())) + "\n")
    if "experiments.robot.libero.collect_demos" in ARGUMENTS:
        collect()
    elif "vla-scripts/finetune.py" in ARGUMENTS:
        train()
    elif "experiments/robot/libero/run_libero_eval.py" in ARGUMENTS:
        evaluate()
    else:
        sys.exit(f"no stub of {ARGUMENTS}")


def install(folder: Path) -> dict[str, str]:
    """Write `python-stub` and `torchrun-stub`; returns the variables that make a table script use them."""
    for name in ("python-stub", "torchrun-stub"):
        stub = folder / name
        stub.write_text(f"#!{sys.executable} -IS\n" + Path(__file__).read_text())
        stub.chmod(0o755)
    return {
        "PYTHON": str(folder / "python-stub"),
        "TORCHRUN": str(folder / "torchrun-stub"),
        "STUB_CALLS": str(folder / "calls"),
        "STUB_VIOLATIONS": str(folder / "violations"),
        "RUN_ROOT_DIR": str(folder / "work"),
        "RESULTS_DIR": str(folder / "out"),
    }


def clean_environment() -> dict[str, str]:
    """This process's variables without those a table script reads."""
    text = (Path(__file__).parents[2] / "craft_experiments" / "common_utils" / "run_table.sh").read_text()
    read = {line.split()[0] for line in text.split('TABLE_FLAGS="')[1].split('"')[0].splitlines() if line}
    return {name: value for name, value in os.environ.items() if name not in read}


if __name__ == "__main__":
    main()
