"""Kills, signals and lost processes: what a run leaves, and that it goes on as if nothing had happened."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import micro
import pytest
import torch
from safetensors.torch import load_file

from prismatic.command_line import faults_in_one_line
from prismatic.models.presets import PRESETS
from prismatic.training.checkpoint_folder import LISTING, check_files, find_checkpoints
from prismatic.training.config import FinetuneConfig
from prismatic.training.faults import FAULTS, DataWorkerError, batches_of, explained_faults
from prismatic.vla.datasets.source import DataSetError

ROOT = Path(__file__).resolve().parents[2]
HARNESS = Path(__file__).with_name("kill_harness.py")
START = ROOT / "pretrained_models" / "tiny-libero-object"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def metrics(root: Path, name: str) -> list[dict]:
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in micro.MEASURED} for line in lines]


def final_state(folder: Path) -> dict:
    """Everything two equal runs share bit for bit: hashes of all tensors and generators, and the counters."""
    files = json.loads((folder / LISTING).read_text())["files"]
    state = {n: f["sha256"] for n, f in files.items() if n.endswith(".safetensors") or "generators" in n}
    counters = json.loads((folder / "training_state" / "state.json").read_text())
    counters["constraint_metrics"] = {
        k: v for k, v in counters["constraint_metrics"].items() if k not in micro.MEASURED
    }
    return state | {"counters": counters}


@pytest.mark.slow
def test_thirty_kills_leave_no_trace(tmp_path):
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, str(HARNESS), str(tmp_path), "160", "30", "3"],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    hits = report["hits"]
    assert len(hits) == 30 and hits[-1]["step"] < 160
    assert sum(hit["inside"] for hit in hits) >= 10 and len({hit["step"] for hit in hits}) >= 10
    whole, killed = tmp_path / "whole--160_chkpt", tmp_path / "killed--160_chkpt"
    assert final_state(killed) == final_state(whole)
    assert metrics(tmp_path, "killed") == metrics(tmp_path, "whole")
    assert [step for step, _ in find_checkpoints(tmp_path, "killed")] == [50, 100, 150, 155, 160]
    assert all(check_files(folder, training_state=True) for _, folder in find_checkpoints(tmp_path, "killed"))
    assert [p.name for p in tmp_path.iterdir() if p.suffix in (".tmp", ".old", ".deleted")] == []


# ------------------------------------------------------------------------------------------------ the command line


# Threads of the process group abort a process that ends before them; they hang one whose DDP wrapper owns them last.
# After a signal a process no longer waits for the others as long as `--ddp_timeout` says.
PROGRAM = """
import gc, os, runpy, signal, torch
from datetime import timedelta
from torch.distributed.distributed_c10d import _set_pg_timeout

def be_impatient(number, frame):
    _set_pg_timeout(timedelta(seconds=5))
    open(os.environ["CRAFT_TEST_IMPATIENT"], "w").close()

signal.signal(signal.SIGUSR2, be_impatient)
leave = torch.distributed.destroy_process_group

def leave_alone(group=None):
    assert torch.nn.parallel.DistributedDataParallel not in map(type, gc.get_objects())
    leave(group)

torch.distributed.destroy_process_group = leave_alone
runpy.run_path("vla-scripts/finetune.py", run_name="__main__")
assert not torch.distributed.is_initialized()
"""


def command(folder: Path, name: str, steps: int, *flags: str) -> list[str]:
    return [
        sys.executable, "-c", PROGRAM, "--config_file_path", str(START),
        "--data_root_dir", str(micro.DATA), "--dataset_name", "libero_mini_no_noops",
        "--run_root_dir", str(folder), "--run_id_override", name, "--batch_size", "1", "--max_steps", str(steps),
        "--save_freq", "1000", "--learning_rate", "1e-4", "--device", "cpu", "--use_lora", "True", "--lora_rank", "2",
        "--lora_dropout", "0.2", "--use_craft", "True", "--craft_log_freq", "1", "--resume", "auto", *flags,
    ]  # fmt: skip


def launch(arguments: list[str], processes: int = 1, impatient: str = "") -> list[subprocess.Popen]:
    """The processes of a run, each in a group of its own as a scheduler starts them. impatient: see `PROGRAM`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = ENVIRONMENT | {"CRAFT_TEST_IMPATIENT": impatient}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started.append(
            subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=environment,
                text=True,
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        )
    return started


def finish(processes: list[subprocess.Popen], timeout: float = 900) -> list[str]:
    """Output of each; every process has ended afterwards."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def wait_for_steps(root: Path, name: str, count: int, process: subprocess.Popen, timeout: float = 900) -> None:
    file, end = root / name / "metrics.jsonl", time.monotonic() + timeout
    while not (file.exists() and len(file.read_text().splitlines()) >= count):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0][-3000:]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_run_resumes_where_it_was(tmp_path, processes):
    # The signal goes to the whole group, data workers included, and to one rank only.
    flags = ("--num_data_workers", "1")
    run = launch(command(tmp_path, "run", 100_000, *flags), processes)
    wait_for_steps(tmp_path, "run", 2, run[0])
    os.killpg(run[-1].pid, signal.SIGTERM)
    outputs = finish(run)
    assert [process.returncode for process in run] == [0] * processes, outputs[-1][-3000:]
    assert "Asked to stop: saving step" in outputs[0]
    stopped = [step for step, _ in find_checkpoints(tmp_path, "run")]
    assert len(stopped) == 1 and 2 <= stopped[0] < 100_000
    assert (tmp_path / "run" / "latest").read_text() == f"run--{stopped[0]}_chkpt\n"
    steps = stopped[0] + 3
    for name in ("run", "whole"):
        again = launch(command(tmp_path, name, steps), processes)
        outputs = finish(again)
        assert [process.returncode for process in again] == [0] * processes, outputs[-1][-3000:]
    whole, resumed = (tmp_path / f"{name}--{steps}_chkpt" for name in ("whole", "run"))
    assert final_state(resumed) == final_state(whole)  # the generators of every rank among it
    ranks = json.loads((whole / "training_state" / "generators.json").read_text())["ranks"]
    assert len(ranks) == processes == len({rank["torch"] for rank in ranks})
    assert metrics(tmp_path, "run") == metrics(tmp_path, "whole")
    assert load_file(whole / "training_state" / "trainable.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_stop_when_a_process_dies_or_hangs(tmp_path, number):
    impatient = tmp_path / "impatient"
    run = launch(command(tmp_path, "run", 100_000, "--ddp_timeout", "1800"), 2, str(impatient))
    wait_for_steps(tmp_path, "run", 2, run[0])
    os.kill(run[0].pid, signal.SIGUSR2)
    while run[0].poll() is None and not impatient.exists():
        time.sleep(0.02)
    os.kill(run[1].pid, number)
    try:
        output = finish(run[:1])[0]
    finally:
        run[1].kill()
        run[1].communicate()
    assert run[0].returncode not in (0, None)
    assert "another of the 2 processes is gone or did not answer within --ddp_timeout 1800 s" in output, output[-3000:]


# ------------------------------------------------------------------------------------------------ in this process


@pytest.fixture
def trainer(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
    flags = micro.flags(tmp_path / "runs") | {"max_steps": 30, "save_freq": 1000}
    return lambda **other: make_trainer("run", **(flags | other))


def at_step(trainer, monkeypatch, step: int, action) -> None:
    """Let `action` happen before optimizer step `step`."""
    train = trainer._train_one_step
    monkeypatch.setattr(trainer, "_train_one_step", lambda b: (trainer.step == step and action(), train(b))[1])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dead_data_worker_is_named(trainer, monkeypatch, workers):
    run = trainer(num_data_workers=workers)
    at_step(run, monkeypatch, 2, lambda: os.kill(active_children()[0].pid, signal.SIGKILL))
    with pytest.raises(DataWorkerError, match=f"a data worker died.*lower --num_data_workers .it is {workers}."):
        run.fit()
    assert active_children() == []
    assert run.step < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(trainer, monkeypatch, tmp_path, number):
    before = signal.getsignal(number)
    run = trainer()
    at_step(run, monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    run.fit()
    assert run.step == 3
    assert [step for step, _ in find_checkpoints(tmp_path / "runs", "run")] == [3]
    assert signal.getsignal(number) == before
    resumed = trainer(max_steps=5, resume="auto")
    assert resumed.step == 3


def test_a_second_sigterm_is_left_to_the_kernel(trainer, monkeypatch):
    run, seen = trainer(), []

    def act() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        seen.append(signal.getsignal(signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(signal.getsignal(signal.SIGTERM))

    at_step(run, monkeypatch, 1, act)
    run.fit()
    assert callable(seen[0]) and seen[1] == signal.SIG_DFL


def test_without_processes_to_agree_with_a_step_costs_no_collective(trainer, monkeypatch):
    run = trainer(max_steps=2)
    monkeypatch.setattr(type(run.accelerator), "reduce", lambda *_a, **_k: pytest.fail("a collective"))
    run.fit()


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise DataSetError(f"record {index}: found a JPEG image that cannot be decoded")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_in_the_middle_of_a_training_is_one_line(workers, capsys):
    cfg = FinetuneConfig(num_data_workers=workers)
    loader = torch.utils.data.DataLoader(Broken(), num_workers=workers)
    with pytest.raises(SystemExit) as end, faults_in_one_line("finetune.py", FAULTS), explained_faults(cfg, 1):
        list(batches_of(loader))
    assert end.value.code == 1
    expected = "finetune.py: error: record 0: found a JPEG image that cannot be decoded\n"
    assert capsys.readouterr().err == expected
