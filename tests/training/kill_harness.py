"""Run by test_interruptions.py: one run undisturbed, and the same run killed again and again and resumed each time.

Arguments: folder, steps, kills, seed. A fork server: this process imports everything, starts no threads and forks each
run, which takes milliseconds instead of a cold start. Prints one JSON line: what the kills hit.
"""

import json
import os
import random
import select
import signal
import sys
import time
import traceback
from pathlib import Path

import kill_points
import micro
import torch
from accelerate import Accelerator

from prismatic.training.config import FinetuneConfig
from prismatic.training.loop import Trainer, seed_everything
from prismatic.training.setup import build_setup

torch.set_num_threads(1)
micro.install()
root, steps, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
# Every call that makes a checkpoint what it is: a kill before the n-th of them lands inside a save.
CALLS = (*kill_points.CALLS, "fsync")


def start(name: str, kill_at: int | None = None, most: int | None = None, **flags) -> tuple[int, int]:
    """Fork a run; returns its process id and a pipe that gets a byte when training starts.

    With `most` logged steps it waits to be killed, so that it cannot end while this process gets no processor time.
    """
    ready, started = os.pipe()
    pid = os.fork()
    if pid:
        os.close(started)
        return pid, ready
    code = 1
    try:
        log = os.open(root / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        train(name, kill_at, most, started, flags)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(name: str, kill_at: int | None, most: int | None, started: int, flags: dict) -> None:
    cfg = FinetuneConfig(**micro.flags(root, name) | {"max_steps": steps, "save_freq": 5} | flags)
    seed_everything(cfg.seed)
    trainer = Trainer(cfg, build_setup(cfg), Accelerator(cpu=True))
    if kill_at is not None:
        kill_points.kill_at_call(kill_at, CALLS)
    if most is not None:
        wait_after(trainer, most)
    os.write(started, b"x")
    trainer.fit()


def wait_after(trainer: Trainer, most: int) -> None:
    step = trainer._train_one_step

    def limited(batches):
        while logged_steps() >= most:
            signal.pause()
        return step(batches)

    trainer._train_one_step = limited


def leftovers() -> list[str]:
    """Names that only exist while a checkpoint is written or deleted."""
    return [p.name for p in root.iterdir() if p.suffix in (".tmp", ".old", ".deleted")]


def newest() -> int:
    return max((int(p.name.split("--")[1].split("_")[0]) for p in root.glob("killed--*_chkpt")), default=0)


def logged_steps() -> int:
    file = root / "killed" / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def kill_after_some_steps(rng: random.Random, pid: int, ready: int, target: int) -> int:
    """SIGKILL a little after `target` logged steps, whatever the load of the machine; returns the process's status."""
    select.select([ready], [], [], 600)
    while logged_steps() < target:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.06))
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def kill_once(rng: random.Random) -> dict:
    """One run that ends by SIGKILL: before a random call of a save, or at a random time."""
    at_call = rng.random() < 0.5
    flags = {"resume": "auto", "async_save": rng.random() < 0.5, "keep_last": 3, "keep_every": 50}
    call, target = rng.randint(1, 120) if at_call else None, logged_steps() + rng.randint(0, 5)
    pid, ready = start("killed", call, None if at_call else target + 3, **flags)
    status = os.waitpid(pid, 0)[1] if at_call else kill_after_some_steps(rng, pid, ready, target)
    os.close(ready)
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert died, f"a run ended by itself: see {root / 'killed.log'}"
    return {"at_call": at_call, "async": flags["async_save"], "inside": at_call or bool(leftovers()), "step": newest()}


def main() -> None:
    rng, before = random.Random(seed), time.perf_counter()
    pid, ready = start("whole")
    select.select([ready], [], [], 600)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the undisturbed run failed: see {root / 'whole.log'}"
    seconds = time.perf_counter() - before
    hits = [kill_once(rng) for _ in range(kills)]
    pid, ready = start("killed", resume="auto", keep_last=3, keep_every=50)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the last run failed: see {root / 'killed.log'}"
    print(json.dumps({"hits": hits, "undisturbed_seconds": seconds, "seconds": time.perf_counter() - before}))


main()
